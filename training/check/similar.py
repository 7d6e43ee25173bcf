"""Whether two rows are one example with small edits: the second, exact look at what MinHash brought together.

Words are compared without regard to their places, and so are pairs of neighbours, which hold the order: unlike an
alignment, that takes a time that grows with the length alone. What many rows share (shared.py) isn't counted: what
changed is measured by what is a row's own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from manylora.training.check.shared import Shared, words_of

ALIKE = 0.8
"""Of all characters in own words, the share that must be the same."""
SIDE_ALIKE = 0.5
"""The same of prompt and answer each: other answers to one prompt, and one answer to other prompts, are no copies."""
PAIRS_ALIKE = 0.5
"""Of all own pairs of neighbouring words, the share that must be the same."""
SAME_ANSWER = 0.9
"""From this share on, one prompt's two answers count as one."""


class Likeness(Enum):
    """How two rows compare."""

    OTHER = "other"
    NEAR = "near"
    """One example with small edits; the edits may make another answer of a short one."""
    SAME = "same"
    """One example with edits that hardly change what it teaches."""


@dataclass(frozen=True, slots=True)
class Side:
    """A prompt's or an answer's words."""

    words: Counter[str]
    pairs: Counter[tuple[str, str]]
    own: int
    """Characters in words that aren't shared with many rows."""
    own_pairs: int
    """Pairs that aren't."""

    @classmethod
    def of(cls, text: str, shared: Shared) -> "Side":
        """Split a text into small-letter words and numbers."""
        words = words_of(text)
        covered = shared.covers(words)
        own = sum(len(word) for word, common in zip(words, covered, strict=True) if not common)
        own_pairs = sum(not all(pair) for pair in pairwise(covered))
        return cls(Counter(words), Counter(pairwise(words)), own, own_pairs)


@dataclass(frozen=True, slots=True)
class Sides:
    """A row's words."""

    prompt: Side
    answer: Side

    @classmethod
    def of(cls, prompt: str, answer: str, shared: Shared) -> "Sides":
        """Split a row's two texts."""
        return cls(Side.of(prompt, shared), Side.of(answer, shared))


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed from one side to another."""

    removed: Counter[str]
    added: Counter[str]
    changed: int
    """Characters in words removed, or added if those are more."""
    total: int
    """Characters in the own words of the side that has more."""

    @classmethod
    def between(cls, first: Side, second: Side) -> "Difference":
        """Compare two sides."""
        removed, added = first.words - second.words, second.words - first.words
        return cls(removed, added, max(_size(removed), _size(added)), max(first.own, second.own))

    @property
    def alike(self) -> float:
        """The share that stayed; without words of their own, whether nothing changed."""
        return 1 - self.changed / self.total if self.total else float(not self.changed)

    @property
    def other_numbers(self) -> bool:
        """Whether a number took another's place."""
        return any(map(str.isdigit, self.removed)) and any(map(str.isdigit, self.added))


def _size(words: Mapping[str, int]) -> int:
    return sum(len(word) * times for word, times in words.items())


def compare(first: Sides, second: Sides) -> Likeness:
    """Say whether two rows are one example with small edits.

    They aren't when a number differs, or when the same word was exchanged in prompt and answer: then a template was
    filled in twice, and each copy teaches something.
    """
    prompt = Difference.between(first.prompt, second.prompt)
    answer = Difference.between(first.answer, second.answer)
    total = prompt.total + answer.total
    if not total or prompt.changed + answer.changed > (1 - ALIKE) * total:
        return Likeness.OTHER
    if min(prompt.alike, answer.alike) < SIDE_ALIKE or prompt.other_numbers or answer.other_numbers:
        return Likeness.OTHER
    if prompt.removed.keys() & answer.removed.keys() or prompt.added.keys() & answer.added.keys():
        return Likeness.OTHER
    if not _in_order(first, second):
        return Likeness.OTHER
    return Likeness.SAME if answer.alike >= SAME_ANSWER else Likeness.NEAR


def _in_order(first: Sides, second: Sides) -> bool:
    """Whether most neighbours that aren't shared with many rows are neighbours in both."""
    kept = (first.prompt.pairs & second.prompt.pairs).total() + (
        first.answer.pairs & second.answer.pairs
    ).total()
    longer = max(one.prompt.pairs.total() + one.answer.pairs.total() for one in (first, second))
    own = max(one.prompt.own_pairs + one.answer.own_pairs for one in (first, second))
    return longer - kept <= (1 - PAIRS_ALIKE) * own
