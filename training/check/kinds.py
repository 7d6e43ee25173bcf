"""What the data check looks for: one entry a kind, with how bad it is and what it is called. No detecting here."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag, auto
from typing import Literal

from manylora.training.errors import InvalidArgument

Severity = Literal["error", "warning", "info"]


class Flag(IntFlag):
    """The kinds as bits, so that a row's verdicts are one number."""

    BROKEN = auto()
    EMPTY = auto()
    UNTRAINED = auto()
    ROLES = auto()
    OVERLONG = auto()
    REPEATS = auto()
    CUT_OFF = auto()
    MOJIBAKE = auto()
    CONTROL = auto()
    EXACT_DUPLICATE = auto()
    NEAR_DUPLICATE = auto()
    INCONSISTENT = auto()
    OVERLAP = auto()
    LENGTH_OUTLIER = auto()
    LANGUAGE_OUTLIER = auto()
    USUAL_ANSWER = auto()
    SAME_IN_EFFECT = auto()
    """Neither are findings. SAME_IN_EFFECT: a near duplicate whose answer can't be called another one. USUAL_ANSWER: of
    a prompt's different answers, this row has the one that most rows give."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of finding."""

    flag: Flag
    severity: Severity
    """error: nothing good can be learnt from the row; warning: look at it; info: unusual, and often right."""
    title: str
    says: str
    """What follows "N rows" in a sentence."""
    cure: Literal["removed", "repaired", "asked"]
    """What a cleaned file does with such a row; asked: leaves it out if that was asked for, else keeps it."""

    @property
    def name(self) -> str:
        """The kind's name in JSON and in ``--ignore``."""
        return str(self.flag.name).lower().replace("_", "-")


KINDS: tuple[Kind, ...] = (
    Kind(Flag.BROKEN, "error", "Broken rows", "can't be read as an example", "removed"),
    Kind(Flag.EMPTY, "error", "Empty rows", "have an empty message where text belongs", "removed"),
    Kind(Flag.UNTRAINED, "error", "Nothing to learn", "have no trained text", "removed"),
    Kind(Flag.ROLES, "error", "Wrong role order", "have turns in an order no chat has", "removed"),
    Kind(Flag.OVERLONG, "warning", "Overlong", "are longer than training will read", "asked"),
    Kind(
        Flag.REPEATS,
        "warning",
        "Text that loops",
        "have an answer that says the same over and over",
        "asked",
    ),
    Kind(Flag.CUT_OFF, "warning", "Cut off", "have an answer that stops where the others don't", "asked"),
    Kind(
        Flag.MOJIBAKE, "warning", "Mojibake", "have text that was decoded with the wrong encoding", "repaired"
    ),
    Kind(Flag.CONTROL, "warning", "Control characters", "have invisible control characters", "repaired"),
    Kind(Flag.EXACT_DUPLICATE, "warning", "Exact duplicates", "repeat an earlier row word for word", "asked"),
    Kind(
        Flag.NEAR_DUPLICATE,
        "warning",
        "Near duplicates",
        "repeat an earlier row but for small edits",
        "asked",
    ),
    Kind(
        Flag.INCONSISTENT,
        "warning",
        "Inconsistent answers",
        "share a prompt and answer it differently",
        "asked",
    ),
    Kind(
        Flag.OVERLAP,
        "warning",
        "Overlap with the evaluation data",
        "are in the evaluation data too",
        "asked",
    ),
    Kind(Flag.LENGTH_OUTLIER, "info", "Unusual length", "are far longer than the others", "asked"),
    Kind(
        Flag.LANGUAGE_OUTLIER, "info", "Unusual language", "are in a language that few others are in", "asked"
    ),
)
"""In the order of reports."""

BY_NAME = {kind.name: kind for kind in KINDS}


def flags_named(names: Sequence[str]) -> int:
    """Return the bits of kinds by their names. Raises InvalidArgument with the names that exist."""
    found = 0
    for name in names:
        if name not in BY_NAME:
            raise InvalidArgument(f"there is no kind of finding {name!r}; there are {', '.join(BY_NAME)}")
        found |= int(BY_NAME[name].flag)
    return found
