"""What a check found: for each kind how many rows, which, and a few to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manylora.training.check.kinds import KINDS, Flag, Kind, Severity
from manylora.training.check.reading import DataFile
from manylora.training.check.table import RowTable
from manylora.training.data.example import Source

EXAMPLES = 5
SHOWN = 3
"""Examples where there is room for few."""
EXCERPT = 160


@dataclass(frozen=True, slots=True)
class Place:
    """A row that a finding is about."""

    source: Source
    excerpt: str
    like: Source | None = None
    """The row that it repeats or contradicts."""

    def __str__(self) -> str:
        return str(self.source)


@dataclass(frozen=True, slots=True)
class Finding:
    """All rows of one kind."""

    kind: Kind
    count: int
    """Rows found in all files."""
    trained: int
    """Those of them that are trained on, not evaluated with."""
    rows: int
    """All that are trained on."""
    eval_rows: int
    examples: tuple[Place, ...]
    lines: Mapping[str, NDArray[np.int64]]
    """By file, all the lines."""
    numbers: Mapping[str, NDArray[np.int64]]
    """By file, which rows of it these are, from 1."""

    @property
    def share(self) -> float:
        """Of the rows that are trained on."""
        return self.trained / self.rows if self.rows else 0.0

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return self.kind.severity

    @property
    def sentence(self) -> str:
        """The finding in a sentence, with the first lines."""
        first = ", ".join(str(place) for place in self.examples[:SHOWN])
        return f"{self.kind.title}: {self._how_many} {self.kind.says}: {first}{self.shown(SHOWN)}"

    @property
    def _how_many(self) -> str:
        if not self.eval_rows:
            return f"{self.trained:,} of {self.rows:,} rows"
        said = f"{self.trained:,} of {self.rows:,} training rows"
        evaluated = self.count - self.trained
        return f"{said} and {evaluated:,} of {self.eval_rows:,} evaluation rows" if evaluated else said

    def shown(self, most: int) -> str:
        """Say how many of the rows are named, where ``most`` are and there are more."""
        return f" ({most} of {self.count:,} shown)" if self.count > most else ""


@dataclass(frozen=True, slots=True)
class Mix:
    """How many rows there are of each sort."""

    names: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found."""

    files: tuple[DataFile, ...]
    rows_per_file: tuple[int, ...]
    findings: tuple[Finding, ...]
    flags: NDArray[np.uint32]
    """[rows] all verdicts on each row, files one behind the other; bits of kinds.Flag."""
    lengths: Mix
    """Rows that are trained on by tokens; each name is the lower edge of a bin."""
    languages: Mix
    """Rows that are trained on by language."""
    estimated_lengths: bool
    max_length: int | None
    seconds: float

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(self.rows_per_file)

    @property
    def ok(self) -> bool:
        """Whether there is no finding but information."""
        return all(finding.severity == "info" for finding in self.findings)

    def sentences(self) -> list[str]:
        """The report in sentences, worst first."""
        names = ", ".join(f"{file.path} ({file.format})" for file in self.files)
        opening = f"{self.rows:,} rows in {names} checked in {self.seconds:.1f} s"
        if not self.findings:
            return [f"{opening}: nothing found."]
        order = ("error", "warning", "info")
        return [f"{opening}."] + [
            finding.sentence for level in order for finding in self.findings if finding.severity == level
        ]

    def html_section(self) -> str:
        """The report as a part of an HTML page, with its plots."""
        from manylora.training.check.page import section

        return section(self)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON's types; ``lines`` holds every row found, ``row_numbers`` which row of its file it is."""
        return {
            "rows": self.rows,
            "files": [
                {"path": file.path, "format": file.format, "rows": rows, "evaluates": file.evaluates}
                for file, rows in zip(self.files, self.rows_per_file, strict=True)
            ],
            "ok": self.ok,
            "findings": [_finding_as_json(finding) for finding in self.findings],
            "tokens": dict(zip(self.lengths.names, self.lengths.counts, strict=True)),
            "tokens_estimated": self.estimated_lengths,
            "max_length": self.max_length,
            "languages": dict(zip(self.languages.names, self.languages.counts, strict=True)),
            "seconds": round(self.seconds, 3),
        }


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind.name,
        "severity": finding.severity,
        "count": finding.count,
        "training_count": finding.trained,
        "share": finding.share,
        "sentence": finding.sentence,
        "examples": [
            {
                "path": place.source.path,
                "line": place.source.line,
                "row": place.source.row,
                "excerpt": place.excerpt,
                "like": None if place.like is None else str(place.like),
            }
            for place in finding.examples
        ],
        "lines": {path: lines.tolist() for path, lines in finding.lines.items()},
        "row_numbers": {path: numbers.tolist() for path, numbers in finding.numbers.items()},
    }


def findings_of(
    table: RowTable, files: Sequence[DataFile], kinds: Sequence[Kind] = KINDS
) -> tuple[Finding, ...]:
    """Gather each kind's rows from a table whose flags are set."""
    flags, of_file = np.asarray(table.column("flags")), np.asarray(table.column("file"))
    lines = np.asarray(table.column("line"))
    sizes = np.bincount(of_file, minlength=len(files))
    starts = np.concatenate(([0], np.cumsum(sizes)))
    evaluated = np.array([file.evaluates for file in files])
    found = []
    for kind in kinds:
        rows = np.flatnonzero(flags & np.uint32(kind.flag))
        if not len(rows):
            continue
        by_file = {index: rows[of_file[rows] == index] for index in range(len(files))}
        by_file = {index: some for index, some in by_file.items() if len(some)}
        found.append(
            Finding(
                kind,
                count=len(rows),
                trained=int((~evaluated[of_file[rows]]).sum()),
                rows=int(sizes[~evaluated].sum()),
                eval_rows=int(sizes[evaluated].sum()),
                examples=tuple(_place(table, files, int(row), kind) for row in rows[:EXAMPLES]),
                lines={files[index].path: lines[some].astype(np.int64) for index, some in by_file.items()},
                numbers={files[index].path: some - starts[index] + 1 for index, some in by_file.items()},
            )
        )
    return tuple(found)


_PARTNER = {
    Flag.EXACT_DUPLICATE: "like",
    Flag.NEAR_DUPLICATE: "like",
    Flag.OVERLAP: "like",
    Flag.INCONSISTENT: "against",
}
"""The column that holds the other row of a finding about two."""


def _place(table: RowTable, files: Sequence[DataFile], row: int, kind: Kind) -> Place:
    text = table.text(row)
    if kind.flag in Flag.CUT_OFF | Flag.REPEATS:
        excerpt = "…" + text.answer[-EXCERPT:] if len(text.answer) > EXCERPT else text.answer
    else:
        excerpt = text.error or shortened(f"{text.prompt} → {text.answer}" if text.prompt else text.answer)
    like = int(table.column(_PARTNER[kind.flag])[row]) if kind.flag in _PARTNER else -1
    return Place(_source(table, files, row), excerpt, _source(table, files, like) if like >= 0 else None)


def _source(table: RowTable, files: Sequence[DataFile], row: int) -> Source:
    file, line, number = (int(table.column(name)[row]) for name in ("file", "line", "number"))
    return Source(files[file].path, line, number or None)


def shortened(text: str, limit: int = EXCERPT) -> str:
    """One line of a text, its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
