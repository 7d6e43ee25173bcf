"""Exports of adapters and mixtures as jobs: each in a process of its own, one after the other.

    directory/<id>/adapter/   the adapter's files, linked when the job was asked for: that version is exported
    directory/<id>/parts/<n>  the same of a mixture's parts
    directory/<id>/job.json   written when the job has succeeded
    directory/<id>/result/    what was made: a model's directory, or one archive

Lives on the event loop. Whatever a crash leaves is deleted at the next start; finished results stay until deleted.
"""

import asyncio
import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from structlog import get_logger

from manylora.adapters.durable import write_whole
from manylora.adapters.errors import AdapterError
from manylora.server.api.export_process import NICENESS, ExportProcess
from manylora.server.errors import ModelNotFound, QueueFull, ShuttingDown

log = get_logger(__name__)
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
MOST_QUEUED = 16
MOST_NAMED = 20
"""Jobs that an error lists."""
MOST_FINISHED = 256
"""Failed and cancelled jobs that are remembered; succeeded ones stay with their results."""
LONGEST_FILE_NAME = 100
"""Characters of a name, or of a mixture's text, that go into the name of a file."""
_RECORD = "job.json"


@dataclass(frozen=True, slots=True)
class ExportedPart:
    """One adapter of a mixture, in the version that is exported."""

    adapter: str
    version: int
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What is to be exported."""

    name: str
    """An adapter's, a mixture's, or an unnamed mixture as text."""
    version: int | None
    """None: an unnamed mixture has none."""
    digest: str | None
    """Of an adapter's files; None for a mixture."""
    parts: tuple[ExportedPart, ...] = ()
    """A mixture's, none with weight 0; () for an adapter that is exported as it is."""


@dataclass(frozen=True, slots=True)
class ExportForm:
    """What is to be made of it: fields of ExportSettings."""

    format: str
    base: str = "auto"
    """Which of the base's weights are merged into."""
    dtype: str = "auto"
    combine: str | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One export, as it is now."""

    id: str
    adapter: str
    """What is exported: an adapter's name, a mixture's, or a mixture as text."""
    version: int | None
    digest: str | None
    format: str
    base: str
    dtype: str
    created: int
    """Unix time, as the next two."""
    status: Status = "queued"
    stage: str = ""
    progress: float = 0.0
    started: int | None = None
    finished: int | None = None
    error: str | None = None
    path: str | None = None
    """Where the result is."""
    bytes: int | None = None
    manifest: dict[str, Any] | None = None
    parts: tuple[ExportedPart, ...] = ()
    combine: str | None = None
    rank: int | None = None

    @property
    def file_name(self) -> str:
        """What the result is called after, as a file's name takes it."""
        return self.adapter.replace("/", "_")[:LONGEST_FILE_NAME]

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class ExportedBase:
    """What the server serves, as an export must know it; ``settings`` are further fields of ExportSettings."""

    directory: Path
    settings: dict[str, object]


class ExportJobs:
    """All jobs of a server. ``open`` before use, ``close`` at the end."""

    def __init__(self, directory: Path, base: ExportedBase, files_of: Callable[[str], Path]) -> None:
        self.directory = directory.absolute()
        self.base = base
        self._files_of = files_of
        self.niceness = NICENESS
        self._jobs: dict[str, ExportJob] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._running: dict[str, ExportProcess] = {}
        self._closed = False

    async def open(self) -> None:
        """Find the results of earlier runs, delete what a crash left, and begin to work."""
        self._jobs = await asyncio.to_thread(_recover, self.directory)
        self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Stop the process that runs and delete what is unfinished."""
        self._closed = True
        for job in [job for job in self._jobs.values() if not job.is_over]:
            await self.cancel(job.adapter, job.id)
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker

    async def submit(self, source: ExportSource, form: ExportForm) -> ExportJob:
        """Queue an export of one version of an adapter or a mixture. Raises QueueFull, ShuttingDown or AdapterError."""
        if self._closed or self._worker is None:
            raise ShuttingDown("the server takes no exports now")
        if sum(job.status == "queued" for job in self._jobs.values()) >= MOST_QUEUED:
            raise QueueFull(f"{MOST_QUEUED} exports are waiting; try again when one is done", retry_after=30)
        job = ExportJob(
            id=f"export-{uuid.uuid4().hex[:16]}",
            adapter=source.name,
            version=source.version,
            digest=source.digest,
            created=int(time.time()),
            parts=source.parts,
            **asdict(form),
        )
        # It counts among those that wait before anything is waited for: another may be asked for meanwhile.
        self._jobs[job.id] = job
        try:
            await asyncio.to_thread(self._link_adapter, job)
        except BaseException:
            self._jobs.pop(job.id, None)
            raise
        if self._jobs.get(job.id) is not job:  # cancelled meanwhile, and perhaps forgotten
            await asyncio.to_thread(shutil.rmtree, self.directory / job.id, ignore_errors=True)
            return self._jobs.get(job.id, replace(job, status="cancelled"))
        self._queue.put_nowait(job.id)
        return job

    def list(self, adapter: str | None = None) -> list[ExportJob]:
        """Return all jobs, or those of one adapter, oldest first."""
        return [job for job in self._jobs.values() if adapter is None or job.adapter == adapter]

    def get(self, adapter: str, job_id: str) -> ExportJob:
        """Return a job. Raises ModelNotFound with the jobs that the adapter has."""
        job = self._jobs.get(job_id)
        if job is None or job.adapter != adapter:
            known = ", ".join(each.id for each in self.list(adapter)) or "none"
            raise ModelNotFound(
                f"adapter {adapter[:200]!r} has no export {job_id[:200]!r}; exports: {known}", param="job"
            )
        return job

    def find(self, job_id: str) -> ExportJob:
        """Return a job, whatever it exports. Raises ModelNotFound with the jobs that there are."""
        job = self._jobs.get(job_id)
        if job is None:
            known = ", ".join(each.id for each in self.list(None)[:MOST_NAMED]) or "none"
            raise ModelNotFound(f"there is no export {job_id[:200]!r}; exports: {known}", param="job")
        return job

    async def cancel(self, adapter: str, job_id: str) -> ExportJob:
        """End a job that isn't over and delete what it made. Raises ModelNotFound."""
        job = self.get(adapter, job_id)
        if not job.is_over:
            job = self._change(job_id, status="cancelled", finished=int(time.time()))
            process = self._running.get(job_id)
            if process is not None:
                await asyncio.to_thread(process.stop)
            await asyncio.to_thread(shutil.rmtree, self.directory / job_id, ignore_errors=True)
        return job

    async def delete(self, adapter: str, job_id: str) -> ExportJob:
        """Forget a job that is over, and delete its result. Raises ModelNotFound."""
        job = self.get(adapter, job_id)
        self._jobs.pop(job_id)
        await asyncio.to_thread(shutil.rmtree, self.directory / job_id, ignore_errors=True)
        return job

    def _change(self, job_id: str, **changes: Any) -> ExportJob:
        job = self._jobs[job_id] = replace(self._jobs[job_id], **changes)
        return job

    def _is_running(self, job_id: str) -> bool:
        """Whether a job is still wanted: it may have been cancelled, and forgotten, while its process ended."""
        job = self._jobs.get(job_id)
        return job is not None and job.status == "running"

    def _link_adapter(self, job: ExportJob) -> None:
        """Keep the files of these versions, whatever becomes of the adapters before the job has its turn."""
        home = self.directory / job.id
        try:
            if not job.parts:
                assert job.digest is not None
                _link(self._files_of(job.digest), home / "adapter")
            for number, part in enumerate(job.parts):
                _link(self._files_of(part.digest), home / "parts" / str(number))
        except (OSError, AdapterError) as error:
            shutil.rmtree(home, ignore_errors=True)
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(
                f"the adapter's files can't be kept for the export: {error.strerror}"
            ) from None

    async def _work(self) -> None:
        while True:
            job_id = await self._queue.get()
            job = self._jobs.get(job_id)
            if job is None or job.status != "queued":
                continue
            try:
                await self._run(job)
            except Exception as error:
                log.error("export failed", job=job_id, exc_info=error)
                if self._is_running(job_id):
                    self._fail(job_id, "the export could not be run; the fault is logged under its id")

    async def _run(self, job: ExportJob) -> None:
        home = self.directory / job.id
        result = home / "result"
        if job.format == "peft":
            result = home / "result" / f"{job.file_name}.tar.gz"
        self._change(job.id, status="running", started=int(time.time()), stage="starting")
        loop = asyncio.get_running_loop()

        def hear(stage: str, progress: float) -> None:
            loop.call_soon_threadsafe(self._advance, job.id, stage, progress)

        settings = json.dumps(self._settings(job, home, result))
        with ExportProcess(settings, self.niceness, home / "complaints") as process:
            self._running[job.id] = process
            try:
                outcome = await asyncio.to_thread(process.follow, hear)
            finally:
                del self._running[job.id]
        if not self._is_running(job.id):  # cancelled, and perhaps forgotten
            await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)
        elif isinstance(outcome, str):
            self._fail(job.id, outcome)
        else:
            await self._succeed(job.id, outcome)

    def _advance(self, job_id: str, stage: str, progress: float) -> None:
        if self._is_running(job_id):
            self._change(job_id, stage=stage, progress=progress)

    def _settings(self, job: ExportJob, home: Path, result: Path) -> dict[str, object]:
        parts = [
            {"name": part.adapter, "directory": str(home / "parts" / str(number)), "weight": part.weight}
            for number, part in enumerate(job.parts)
        ]
        return {
            **self.base.settings,
            "adapter": None if parts else str(home / "adapter"),
            "parts": parts,
            "combine": job.combine,
            "rank": job.rank,
            "output": str(result),
            "base": str(self.base.directory.absolute()),
            "format": job.format,
            "into": job.base,
            "dtype": job.dtype,
            "adapter_name": job.adapter,
        }

    async def _succeed(self, job_id: str, manifest: dict[str, Any]) -> None:
        done = replace(
            self._jobs[job_id],
            status="succeeded",
            stage="done",
            progress=1.0,
            finished=int(time.time()),
            manifest=manifest,
        )
        kept = await asyncio.to_thread(_keep, self.directory / job_id, done)
        if self._is_running(job_id):
            self._jobs[job_id] = kept
            log.info("exported", job=job_id, adapter=kept.adapter)

    def _fail(self, job_id: str, error: str) -> None:
        self._change(job_id, status="failed", finished=int(time.time()), error=error)
        log.warning("export failed", job=job_id, error=error)
        shutil.rmtree(self.directory / job_id, ignore_errors=True)
        over = [job.id for job in self._jobs.values() if job.status in ("failed", "cancelled")]
        for old in over[:-MOST_FINISHED]:
            del self._jobs[old]


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


def _keep(home: Path, job: ExportJob) -> ExportJob:
    """Add where the result is, and write the record by which a later start knows it."""
    result = home / "result"
    files = [path for path in result.rglob("*") if path.is_file()]
    path = files[0] if job.format == "peft" else result
    kept = replace(job, path=str(path), bytes=sum(file.stat().st_size for file in files))
    # A record that is there is whole: without one the next start deletes the result.
    write_whole(home / _RECORD, json.dumps(asdict(kept)))
    for linked in ("adapter", "parts"):
        shutil.rmtree(home / linked, ignore_errors=True)
    return kept


def _recover(directory: Path) -> dict[str, ExportJob]:
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
