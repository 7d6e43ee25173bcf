"""Writes a cleaned copy of checked files: rows with errors left out, wrong encodings undone, all else as it was.

A warning may be wrong, so its rows stay unless the user names its kind.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from manylora.adapters.durable import make_ordinary
from manylora.training.check.kinds import BY_NAME, KINDS, Flag, Kind, flags_named
from manylora.training.check.reading import DataFile
from manylora.training.check.report import SHOWN, CheckReport
from manylora.training.check.rows import is_mojibake, repaired
from manylora.training.data.example import Source
from manylora.training.data.files import read_rows
from manylora.training.errors import InvalidArgument

ENDINGS = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class FixReport:
    """What became of the rows."""

    written: Mapping[str, int]
    """By file, the rows that are in it."""
    removed: Mapping[str, Sequence[Source]]
    """By kind, the rows that were left out. A row with several faults is counted under the first."""
    repaired: Mapping[str, Sequence[Source]]
    kept: Mapping[str, int]
    """By kind, how many rows are in it though there is a warning about them."""

    def sentences(self) -> list[str]:
        """What was done, in sentences."""
        said = [f"{rows:,} rows written to {path}" for path, rows in self.written.items()]
        for verb, done in (("left out", self.removed), ("repaired", self.repaired)):
            for kind, sources in done.items():
                first = ", ".join(map(str, sources[:SHOWN]))
                more = f" ({SHOWN} of {len(sources):,} shown)" if len(sources) > SHOWN else ""
                said.append(f"{verb} {len(sources):,} ({kind}): {first}{more}")
        if self.kept:
            kinds = ", ".join(f"{kind} {rows:,}" for kind, rows in self.kept.items())
            said.append(f"kept, with warnings: {kinds}; --remove KIND leaves out those of a kind")
        return said


def fix(report: CheckReport, out: Path, remove: Sequence[str] = ()) -> FixReport:
    """Write the training files of a report without its errors; the evaluation files stay as they are.

    ``remove`` names further kinds whose rows are left out: of duplicates the first stays; of a prompt's different
    answers the one that most rows give, if there is one. One file goes to `out` (.jsonl or .json); several go into a
    new directory `out`, each under its own name. Rows keep their fields. Raises InvalidArgument where something is at
    `out` already, and for a kind that there isn't.
    """
    notes = _Notes(flags_named(remove))
    files = [(index, file) for index, file in enumerate(report.files) if not file.evaluates]
    if out.exists():
        raise InvalidArgument(f"{out}: is there already; a cleaned file never replaces another")
    if len(files) == 1 and out.suffix not in ENDINGS:
        raise InvalidArgument(f"{out}: a cleaned file is JSON; name it {' or '.join(ENDINGS)}")
    if not out.parent.is_dir():
        raise InvalidArgument(f"{out.parent}: there is no such directory")
    if len(files) == 1:
        notes.written[str(out)] = _clean(report, *files[0], out, notes)
    else:
        with _directory(out) as directory:
            for index, file in files:
                name = f"{Path(file.path).stem}.jsonl"
                if (directory / name).exists():
                    name = f"{Path(file.path).stem}-{index + 1}.jsonl"
                notes.written[str(out / name)] = _clean(report, index, file, directory / name, notes)
    return FixReport(notes.written, notes.removed, notes.repaired, notes.kept)


@dataclass(slots=True)
class _Notes:
    """What was asked for, and what was done."""

    asked: int
    """Bits of the kinds whose rows are left out beside those with errors."""
    written: dict[str, int] = field(default_factory=dict)
    removed: dict[str, list[Source]] = field(default_factory=dict)
    repaired: dict[str, list[Source]] = field(default_factory=dict)
    kept: Counter[str] = field(default_factory=Counter)

    def keep(self, verdicts: int) -> None:
        """Count the warnings about a row that stays as it is."""
        self.kept.update(
            kind.name for kind in KINDS if verdicts & ~self.asked & kind.flag and kind.severity == "warning"
        )


@contextmanager
def _directory(out: Path) -> Iterator[Path]:
    """A directory that gets its name when it is whole."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        whole = Path(temporary) / out.name
        whole.mkdir()  # whose mode is what umask gives; a temporary directory is its owner's alone
        yield whole
        whole.rename(out)


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
        make_ordinary(Path(temporary))
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
        verdicts, source = int(report.flags[number]), Source(file.path, row.line, row.number)
        removed_for = _reason(verdicts, notes.asked)
        if removed_for is not None or row.value is None:
            notes.removed.setdefault((removed_for or BY_NAME["broken"]).name, []).append(source)
            continue
        value = row.value
        spoiled = next((kind for kind in KINDS if kind.cure == "repaired" and verdicts & kind.flag), None)
        if spoiled is not None:
            mended = {key: _repaired(item) for key, item in value.items()}
            if _sound(mended):
                notes.repaired.setdefault(spoiled.name, []).append(source)
                value, verdicts = mended, verdicts & ~_REPAIRED
            elif verdicts & notes.asked & _REPAIRED:
                notes.removed.setdefault(spoiled.name, []).append(source)
                continue
        notes.keep(verdicts)
        yield value


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


def _reason(verdicts: int, asked: int) -> Kind | None:
    """Why a row is left out, but for what can't be repaired."""
    if verdicts & Flag.USUAL_ANSWER:
        verdicts &= ~Flag.INCONSISTENT
    for kind in KINDS:
        if verdicts & kind.flag and (kind.cure == "removed" or (kind.cure == "asked" and asked & kind.flag)):
            return kind
    return None


_REPAIRED = int(sum(kind.flag for kind in KINDS if kind.cure == "repaired"))


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
