"""The directory of an export's job: the adapters' files as they were, what was made of them, and what says so.

    <id>/adapter/   the adapter's files, linked when the job was asked for: that version is exported
    <id>/parts/<n>  the same of a mixture's parts
    <id>/job.json   written when the job has succeeded
    <id>/result/    what was made: a model's directory, or one file

All of it blocks.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

from manylora.adapters.durable import write_whole
from manylora.adapters.errors import AdapterError
from manylora.server.exports.job import ExportedBase, ExportedPart, ExportJob

_RECORD = "job.json"
_ADAPTER, _PARTS, _RESULT = "adapter", "parts", "result"


def link_adapters(home: Path, job: ExportJob, files_of: Callable[[str], Path]) -> None:
    """Keep the files of these versions, whatever becomes of the adapters before the job has its turn.

    Raises AdapterError, and then leaves nothing.
    """
    try:
        if not job.parts:
            assert job.digest is not None
            _link(files_of(job.digest), home / _ADAPTER)
        for number, part in enumerate(job.parts):
            _link(files_of(part.digest), home / _PARTS / str(number))
    except (OSError, AdapterError) as error:
        shutil.rmtree(home, ignore_errors=True)
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"the adapter's files can't be kept for the export: {error.strerror}") from None


def settings_of(home: Path, job: ExportJob, base: ExportedBase) -> dict[str, object]:
    """Return the fields of ExportSettings with which the job's process makes what was asked for."""
    parts = [
        {"name": part.adapter, "directory": str(home / _PARTS / str(number)), "weight": part.weight}
        for number, part in enumerate(job.parts)
    ]
    return {
        **base.settings,
        "adapter": None if parts else str(home / _ADAPTER),
        "parts": parts,
        "combine": job.combine,
        "rank": job.rank,
        "output": str(home / _RESULT / f"{job.file_name}{job.suffix}" if job.suffix else home / _RESULT),
        "base": str(base.directory.absolute()),
        "format": job.format,
        "into": job.base,
        "dtype": job.dtype,
        "adapter_name": job.adapter,
    }


def keep_result(home: Path, job: ExportJob) -> ExportJob:
    """Add where the result is, and write the record by which a later start knows it."""
    result = home / _RESULT
    files = [path for path in result.rglob("*") if path.is_file()]
    path = files[0] if job.suffix else result
    kept = replace(job, path=str(path), bytes=sum(file.stat().st_size for file in files))
    # A record that is there is whole: without one the next start deletes the result.
    write_whole(home / _RECORD, json.dumps(asdict(kept)))
    for linked in (_ADAPTER, _PARTS):
        shutil.rmtree(home / linked, ignore_errors=True)
    return kept


def recover(directory: Path) -> dict[str, ExportJob]:
    """Return the finished jobs on disk, oldest first, and delete what is unfinished."""
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for home in directory.iterdir():
        job = _read_record(home)
        if job is None:
            shutil.rmtree(home, ignore_errors=True)
        else:
            found.append(job)
    return {job.id: job for job in sorted(found, key=lambda job: (job.created, job.id))}


def _read_record(home: Path) -> ExportJob | None:
    try:
        values = json.loads((home / _RECORD).read_text())
        known = {field.name for field in fields(ExportJob)}
        given = {key: value for key, value in values.items() if key in known}
        given["parts"] = tuple(ExportedPart(**part) for part in given.get("parts", ()))
        job = ExportJob(**given)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return job if job.path is not None and Path(job.path).exists() else None


def _link(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_dir():
            continue
        linked = target / path.relative_to(source)
        linked.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, linked)
        except OSError:  # another file system
            shutil.copyfile(path, linked)
