"""What was found while data was read and tokenised, for the terminal and the run's report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

SOURCES_NAMED = 5
"""How many lines a sentence names."""
FIELDS_NAMED = 20
"""How many fields that weren't read a sentence names, those of most rows first."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file."""

    path: str
    format: str
    rows: int
    share: float
    used: int
    """Examples taken from it; with a share above 1 more than it has rows."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Names of fields that weren't read, with how many rows have them."""

    def sentences(self) -> Iterator[str]:
        """Say what it is, and what of it wasn't read."""
        share = "" if self.share == 1 else f", share {self.share:g}: {_count(self.used, 'example')}"
        yield f"{self.path}: format {self.format}, {_count(self.rows, 'row')}{share}."
        if self.unread:
            often = sorted(self.unread.items(), key=lambda each: -each[1])
            names = ", ".join(f"{name} ({_count(rows, 'row')})" for name, rows in often[:FIELDS_NAMED])
            more = f", …; {FIELDS_NAMED} of {len(often):,} shown" if len(often) > FIELDS_NAMED else ""
            yield f"{self.path}: fields that were not read: {names}{more}."


@dataclass(slots=True)
class Finding:
    """How many examples something is true of, and where the first stand."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """``file:line``."""

    def add(self, source: object) -> None:
        """Count one."""
        self.count += 1
        if len(self.first) < SOURCES_NAMED:
            self.first.append(str(source))

    def __str__(self) -> str:
        shown = len(self.first)
        more = f", …; {shown} of {self.count:,} shown" if self.count > shown else ""
        return f"{_count(self.count, 'example')} ({', '.join(self.first)}{more})"


@dataclass(frozen=True, slots=True)
class DataReport:
    """All files together."""

    files: tuple[FileReport, ...]
    examples: int
    """What is trained on; in packed data still examples, not rows."""
    max_length: int
    tokens: int = 0
    trained_tokens: int = 0
    truncated: Finding = field(default_factory=Finding)
    """Examples longer than ``max_length``."""
    truncated_tokens: int = 0
    dropped: Finding = field(default_factory=Finding)
    """Truncated examples in which no trained token was left; they aren't in ``examples``."""
    without_stop: Finding = field(default_factory=Finding)
    """Examples, not truncated, whose answers don't end in a trained token that ends generation."""
    not_as_served: Finding = field(default_factory=Finding)
    """Examples of which the chat template writes a turn, or what is before it, otherwise than the server prompts it."""
    folds_system: bool = False
    """Whether system texts were put into the user's first turn, as the chat template takes none."""
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Tokens per example after truncation: "median", "95%", "99%", "longest"."""
    packed_rows: int = 0
    """0: not packed."""

    @property
    def filled(self) -> float:
        """Share of packed rows' room that holds tokens."""
        return self.tokens / (self.packed_rows * self.max_length) if self.packed_rows else 0.0

    def sentences(self) -> list[str]:
        """Say all of it, the findings to worry about last."""
        files = (sentence for file in self.files for sentence in file.sentences())
        return [*files, *self._about_tokens(), *self._about_system(), *self.findings()]

    def _about_tokens(self) -> Iterator[str]:
        spread = ", ".join(f"{name} {value:,}" for name, value in self.lengths.items())
        yield (
            f"{_count(self.examples, 'example')} with {_count(self.tokens, 'token')}, of which {self.trained_tokens:,} "
            f"are trained. Tokens per example: {spread}."
        )
        if self.packed_rows:
            yield (
                f"Packed into {_count(self.packed_rows, 'row')} of {self.max_length:,} tokens, {self.filled:.1%} full."
            )

    def _about_system(self) -> Iterator[str]:
        if self.folds_system:
            yield (
                "The chat template takes no system turn: system texts were put before the user's first. Send them so "
                "to the served model too."
            )

    def findings(self) -> Iterator[str]:
        """Say what there is to worry about."""
        if self.truncated.count:
            yield (
                f"{self.truncated} cut to {self.max_length:,} tokens; {_count(self.truncated_tokens, 'token')} lost. "
                "A larger --model_max_length keeps them."
            )
        if self.dropped.count:
            yield f"{self.dropped} left out: no trained token is left; as a rule the cut took all of the answer."
        if self.without_stop.count:
            yield (
                f"{self.without_stop} without a trained token that ends generation behind the answer: the model may "
                "not learn to stop."
            )
        if self.not_as_served.count:
            yield (
                f"{self.not_as_served} in which the chat template writes an answer, or what stands before it, "
                "otherwise once further turns follow (it leaves out reasoning, or moves the system text); they are "
                "trained as the whole conversation shows them."
            )


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return the spread of examples' lengths as ``DataReport.lengths`` has it."""
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return {
        "median": ordered[last // 2],
        "95%": ordered[round(last * 0.95)],
        "99%": ordered[round(last * 0.99)],
        "longest": ordered[last],
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
