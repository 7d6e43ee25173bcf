"""Whether two rows are one example with small edits: the second, exact look at what MinHash brought together."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import Enum

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\d+|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")
"""Words, numbers, and single characters of the scripts that put no space between words."""
ALIKE = 0.8
"""Of all characters in words, the share that must be the same."""
SIDE_ALIKE = 0.5
"""The same of prompt and answer each: other answers to one prompt, and one answer to other prompts, are no copies."""
SAME_ANSWER = 0.9
"""From this share on, one prompt's two answers count as one."""
LONGEST = 4000
"""Words of a side that are compared; of a longer one, its beginning and its end."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed from one text to another."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    same: int
    """Characters in words that stayed."""
    total: int
    """Characters in words of the longer one."""

    @property
    def alike(self) -> float:
        """The share that stayed; 1 for two texts without words."""
        return self.same / self.total if self.total else 1.0


def words_of(text: str) -> list[str]:
    """Split a text into small-letter words and numbers."""
    words = _WORDS.findall(text.casefold())
    return words if len(words) <= LONGEST else words[: LONGEST // 2] + words[-LONGEST // 2 :]


def difference(first: Sequence[str], second: Sequence[str]) -> Difference:
    """Compare two lists of words."""
    begin = 0
    shorter = min(len(first), len(second))
    while begin < shorter and first[begin] == second[begin]:
        begin += 1
    end = 0
    while end < shorter - begin and first[-1 - end] == second[-1 - end]:
        end += 1
    middle_first, middle_second = first[begin : len(first) - end], second[begin : len(second) - end]
    same = _characters(first[:begin]) + _characters(first[len(first) - end :])
    removed: list[str] = list(middle_first)
    added: list[str] = list(middle_second)
    if middle_first and middle_second and (len(middle_first) > 1 or len(middle_second) > 1):
        removed, added = [], []
        for tag, i, j, k, m in SequenceMatcher(
            None, middle_first, middle_second, autojunk=False
        ).get_opcodes():
            if tag == "equal":
                same += _characters(middle_first[i:j])
            else:
                removed += middle_first[i:j]
                added += middle_second[k:m]
    return Difference(tuple(removed), tuple(added), same, max(_characters(first), _characters(second)))


def _characters(words: Sequence[str]) -> int:
    return sum(map(len, words))


class Likeness(Enum):
    """How two rows compare."""

    OTHER = "other"
    NEAR = "near"
    """One example with small edits; the edits may make another answer of a short one."""
    SAME = "same"
    """One example with edits that hardly change what it teaches."""


def compare(first: tuple[str, str], second: tuple[str, str]) -> Likeness:
    """Say whether two (prompt, answer) pairs are one example with small edits.

    They aren't when a number differs, or when the same word was exchanged in prompt and answer: then a template was
    filled in twice, and each copy teaches something.
    """
    prompt = difference(words_of(first[0]), words_of(second[0]))
    answer = difference(words_of(first[1]), words_of(second[1]))
    total = prompt.total + answer.total
    if not total or (prompt.same + answer.same) < ALIKE * total:
        return Likeness.OTHER
    if min(prompt.alike, answer.alike) < SIDE_ALIKE:
        return Likeness.OTHER
    if set(prompt.removed) & set(answer.removed) or set(prompt.added) & set(answer.added):
        return Likeness.OTHER
    if _other_numbers(prompt) or _other_numbers(answer):
        return Likeness.OTHER
    return Likeness.SAME if answer.alike >= SAME_ANSWER else Likeness.NEAR


def _other_numbers(change: Difference) -> bool:
    return any(map(str.isdigit, change.removed)) and any(map(str.isdigit, change.added))
