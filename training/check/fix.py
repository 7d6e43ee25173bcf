"""Writes a cleaned copy of checked files: bad rows left out, wrong encodings undone, all else as it was."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from manylora.training.check.kinds import KINDS, Flag, Kind
from manylora.training.check.reading import DataFile
from manylora.training.check.report import CheckReport
from manylora.training.check.rows import is_mojibake, repaired
from manylora.training.data.files import read_rows
from manylora.training.errors import InvalidArgument

ENDINGS = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class FixReport:
    """What became of the rows."""

    written: Mapping[str, int]
    """By file, the rows that are in it."""
    removed: Mapping[str, Mapping[str, tuple[int, ...]]]
    """By kind and file, the lines that were left out. A row with several faults is counted under the first."""
    repaired: Mapping[str, Mapping[str, tuple[int, ...]]]

    def sentences(self) -> list[str]:
        """What was done, in sentences."""
        said = [f"{rows:,} rows written to {path}" for path, rows in self.written.items()]
        for verb, done in (("left out", self.removed), ("repaired", self.repaired)):
            for kind, by_file in done.items():
                count = sum(map(len, by_file.values()))
                first = [f"{path}:{line}" for path, lines in by_file.items() for line in lines][:3]
                said.append(f"{verb} {count:,} ({kind}): {', '.join(first)}{', …' if count > 3 else ''}")
        return said


def fix(report: CheckReport, out: Path) -> FixReport:
    """Write the training files of a report without what it found; the evaluation files stay as they are.

    One file goes to `out` (.jsonl or .json); several go into a new directory `out`, each under its own name. Rows keep
    their fields. Of duplicates the first stays; of a prompt's different answers the one that most rows give, if there
    is one. Raises InvalidArgument where something is at `out` already.
    """
    files = [(index, file) for index, file in enumerate(report.files) if not file.evaluates]
    if out.exists():
        raise InvalidArgument(f"{out}: is there already; a cleaned file never replaces another")
    if len(files) == 1 and out.suffix not in ENDINGS:
        raise InvalidArgument(f"{out}: a cleaned file is JSON; name it {' or '.join(ENDINGS)}")
    if not out.parent.is_dir():
        raise InvalidArgument(f"{out.parent}: there is no such directory")
    notes = _Notes()
    if len(files) == 1:
        notes.written[str(out)] = _clean(report, *files[0], out, notes)
    else:
        with _directory(out) as directory:
            for index, file in files:
                name = f"{Path(file.path).stem}.jsonl"
                if (directory / name).exists():
                    name = f"{Path(file.path).stem}-{index + 1}.jsonl"
                notes.written[str(out / name)] = _clean(report, index, file, directory / name, notes)
    return FixReport(notes.written, *map(_frozen, (notes.removed, notes.repaired)))


class _Notes:
    def __init__(self) -> None:
        self.written: dict[str, int] = {}
        self.removed: dict[str, dict[str, list[int]]] = {}
        self.repaired: dict[str, dict[str, list[int]]] = {}


def _frozen(done: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {kind: {path: tuple(lines) for path, lines in by_file.items()} for kind, by_file in done.items()}


@contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """A directory that gets its name when it is whole."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        yield Path(temporary)
        whole = Path(f"{temporary}.whole")
        os.rename(temporary, whole)
        os.mkdir(temporary)  # for the context manager to remove
        os.chmod(whole, 0o755)
        os.rename(whole, out)


def _clean(report: CheckReport, index: int, file: DataFile, out: Path, notes: _Notes) -> int:
    """Write one file's good rows to `out`, whole or not at all; returns how many."""
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as target:
            write = _array_writer(target) if out.suffix == ".json" else _line_writer(target)
            written = 0
            for value in _good_rows(report, index, file, notes):
                write(value)
                written += 1
            if out.suffix == ".json":
                target.write("\n]\n" if written else "[]\n")
            target.flush()
            os.fsync(target.fileno())
        os.chmod(temporary, 0o644)
        os.link(temporary, out)  # which fails where a file came to be meanwhile
    except FileExistsError:
        raise InvalidArgument(f"{out}: is there already; a cleaned file never replaces another") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return written


def _good_rows(
    report: CheckReport, index: int, file: DataFile, notes: _Notes
) -> Iterator[Mapping[str, object]]:
    first = sum(report.rows_per_file[:index])
    for number, row in enumerate(read_rows(file.path), first):
        kind = _reason(int(report.flags[number]))
        if kind is None:
            assert row.value is not None
            yield row.value
            continue
        mended = None
        if kind.cure == "repaired" and row.value is not None:
            mended = {key: _repaired(value) for key, value in row.value.items()}
            if not _sound(mended):
                mended = None
        done = notes.removed if mended is None else notes.repaired
        done.setdefault(kind.name, {}).setdefault(file.path, []).append(row.line)
        if mended is not None:
            yield mended


def _array_writer(target: TextIO) -> Callable[[Mapping[str, object]], None]:
    separator = "[\n"

    def write(value: Mapping[str, object]) -> None:
        nonlocal separator
        target.write(separator + _as_json(value))
        separator = ",\n"

    return write


def _line_writer(target: TextIO) -> Callable[[Mapping[str, object]], None]:
    def write(value: Mapping[str, object]) -> None:
        target.write(_as_json(value) + "\n")

    return write


def _as_json(value: Mapping[str, object]) -> str:
    # Half a surrogate pair has no UTF-8; JSON's own escape keeps it.
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text


def _reason(verdicts: int) -> Kind | None:
    """Why a row can't stay as it is: what removes it comes before what is repaired."""
    if verdicts & Flag.USUAL_ANSWER:
        verdicts &= ~Flag.INCONSISTENT
    faults = [kind for kind in KINDS if verdicts & kind.flag]
    for cure in ("removed", "repaired"):
        for kind in faults:
            if kind.cure == cure:
                return kind
    return None


def _repaired(value: object) -> object:
    """Repair every string in a row."""
    if isinstance(value, str):
        return repaired(value)
    if isinstance(value, Mapping):
        return {key: _repaired(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    return value


def _sound(value: object) -> bool:
    """Whether no string in a row is mojibake."""
    if isinstance(value, str):
        return not is_mojibake(value)
    if isinstance(value, Mapping):
        return all(map(_sound, value.values()))
    return all(map(_sound, value)) if isinstance(value, list) else True
