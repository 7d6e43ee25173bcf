"""Answers that stop where the others don't. What a whole answer looks like is learnt from the data set itself.

A set of labels ends every answer with a letter and a set of essays with a full stop; so an answer is judged beside
those that answer the same sort of prompt or begin the same way.
"""

import re
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from manylora.training.check.texts import RowText

End = Literal["mark", "semicolon", "closer", "letter", "digit", "open", "other"]
_MARKS = frozenset(".!?。！？…؟।॥")
_CLOSERS = frozenset(")]}\"'”’»」』）】》`*_~|>$")
_OPEN = frozenset(",，、:：([{<«“‘-–—=+&/\\（「")
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ("（", "）"), ("「", "」"), ("“", "”"), ("«", "»"))
_SINGLE_QUOTE = re.compile(r"(?<!\w)'|'(?!\w)")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[^\W\d_][.!?] |[。！？]")
_BARE_ITEM = re.compile(r"\n\s*(?:\d{1,3}[.)]|[-*•+])$")
"""The mark of a list's next item, without the item."""
_BLOCK_STARTS = (0, 0x250, 0x590, 0x900, 0x1100, 0x2E80, 0xAC00, 0xD7B0)
_BLOCKS = ("latin", "greek, cyrillic", "hebrew, arabic", "indic", "other", "han, kana", "hangul", "other")
UNUSUAL = 0.05
"""An end that a smaller share of comparable answers has speaks for a cut."""
FEWEST = 40
"""Answers that a group must have to be judged by."""
COMMON = 20
"""How often a phrase must come for its beginnings to be taken for fragments of it."""
ENOUGH_EXPECTED = 3.0
"""How often a phrase would be last, were all places alike, for its hardly ever being last to say something."""
RARE = 0.03
FREQUENT_ANSWER = 20


def end_of(answer: str) -> End:
    """Say what kind of character a text ends in."""
    last = answer.rstrip()[-1:]
    if last in _MARKS:
        return "mark"
    if last in _CLOSERS:
        return "closer"
    if last in _OPEN:
        return "open"
    if last in ";；":
        return "semicolon"
    return "letter" if last.isalpha() else "digit" if last.isdigit() else "other"


def left_open(answer: str) -> frozenset[str]:
    """Say what is opened and not closed: brackets, quotes, a block of code."""
    found = {opening for opening, closing in _PAIRS if answer.count(opening) > answer.count(closing)}
    found |= {mark for mark in ('"', "```") if answer.count(mark) % 2}
    if "'" in answer and len(_SINGLE_QUOTE.findall(answer)) % 2:
        found.add("'")
    return frozenset(found)


def _head(text: str) -> str:
    return " ".join(text[:80].casefold().split()[:2])


def _script(answer: str) -> str:
    """A coarse name of the writing: its first letter's block."""
    for character in answer[:40]:
        if character.isalpha():
            return _BLOCKS[bisect(_BLOCK_STARTS, ord(character)) - 1]
    return "none"


def groups_of(row: RowText) -> tuple[str, ...]:
    """The groups whose habits an answer is judged by, closest first."""
    script = _script(row.answer)
    shape = "short" if len(row.answer) < 24 else "long"
    return (
        f"prompt|{script}|{_head(row.prompt)}",
        f"answer|{script}|{_head(row.answer).split(' ')[0]}",
        f"system|{script}|{shape}|{row.system[:60]}",
        f"{script}|{shape}",
    )


@dataclass(slots=True)
class Habits:
    """How a group's answers end."""

    answers: int
    ends: Counter[str] = field(default_factory=Counter)
    """By kind of last character, and by what is left open."""
    phrases: Counter[str] = field(default_factory=Counter)
    """Words and pairs of words, where answers end in letters."""
    last_phrases: Counter[str] = field(default_factory=Counter)
    words: int = 0
    """All words, where answers end in letters."""
    last_words: int = 0
    fragments: frozenset[str] = frozenset()
    """Beginnings of common phrases that hardly ever stand for themselves."""

    def usual(self, end: str) -> bool:
        """Whether so many answers end like that that chance doesn't explain it."""
        count = self.ends[end]
        return bool(count - 1.5 * count**0.5 > UNUSUAL * self.answers)

    def add_phrases(self, answer: str) -> None:
        """Count an answer's phrases."""
        words = _WORD.findall(answer)
        found = words + _pairs(words)
        self.phrases.update(found)
        self.words += len(words)
        if end_of(answer) == "letter":
            self.last_words += 1
            self.last_phrases.update(words[-1:] + _pairs(words[-2:]))

    def settle(self) -> None:
        """Find the fragments, once all phrases are counted."""
        fragments = set()
        for phrase, times in self.phrases.most_common(20_000):
            if times < COMMON:
                break
            for size in range(phrase.rfind(" ") + 2, len(phrase)):
                if self.phrases[phrase[:size]] <= max(1, RARE * times):
                    fragments.add(phrase[:size])
        self.fragments = frozenset(fragments)

    def breaks_off(self, answer: str) -> bool:
        """Whether the last words are a fragment, or words that come often and hardly ever last."""
        words = _WORD.findall(answer[-200:])
        last = words[-1:] + _pairs(words[-2:])
        if any(phrase in self.fragments for phrase in last):
            return True
        return any(self.last_phrases[phrase] <= self._lasts_to_expect(phrase) for phrase in last)

    def _lasts_to_expect(self, phrase: str) -> float:
        """How seldom a phrase may be last before that is more than chance; below 0 where it is too rare to tell."""
        expected = self.phrases[phrase] * self.last_words / max(self.words, 1)
        return max(1.0, 0.1 * expected) if expected >= ENOUGH_EXPECTED else -1.0


def _pairs(words: Sequence[str]) -> list[str]:
    return [f"{first} {second}" for first, second in pairwise(words)]


@dataclass(frozen=True, slots=True)
class Endings:
    """How a data set's answers end."""

    groups: Mapping[str, Habits]
    beginnings_of_answers: frozenset[str]
    """Proper beginnings of answers that are given again and again, such as labels."""

    @classmethod
    def learn(cls, rows: Sequence[RowText]) -> "Endings":
        """Read a sample of whole and, some of them, cut answers."""
        sizes = Counter(name for row in rows for name in groups_of(row))
        groups = {name: Habits(size) for name, size in sizes.items() if size >= FEWEST}
        answers: Counter[str] = Counter()
        for row in rows:
            ends = (end_of(row.answer), *left_open(row.answer), *_between_words(row.answer))
            for name in groups_of(row):
                if name in groups:
                    groups[name].ends.update(ends)
            if len(row.answer) <= 80:
                answers[row.answer.strip()] += 1
        learnt = cls(groups, _beginnings(answers))
        for row in rows:
            closest = learnt._closest(row)
            if closest is not None and closest.usual("letter"):
                closest.add_phrases(row.answer)
        for habits in learnt.groups.values():
            habits.settle()
        return learnt

    def _closest(self, row: RowText) -> Habits | None:
        return next((self.groups[name] for name in groups_of(row) if name in self.groups), None)

    def cut_off(self, row: RowText) -> bool:
        """Whether an answer seems to stop before its end."""
        answer = row.answer.rstrip()
        habits = self._closest(row)
        if not answer or habits is None:
            return False
        if _BARE_ITEM.search(answer):
            return True
        if any(not habits.usual(gap) for gap in _between_words(row.answer)):
            return True
        end = end_of(answer)
        opened = left_open(answer)
        if any(not habits.usual(mark) for mark in opened) and _matters(answer, end, opened):
            return True
        if end in ("mark", "closer"):
            return False
        if not habits.usual(end):
            # A number is where tables, sums and queries end, too, which a data set may have few of.
            return end != "digit" or _is_prose(answer)
        return answer in self.beginnings_of_answers or (end == "letter" and habits.breaks_off(answer))


def _between_words(answer: str) -> tuple[str, ...]:
    """Whether an answer ends with the space behind a word, as if another were to come."""
    return ("word and space",) if answer.endswith(" ") and end_of(answer) == "letter" else ()


def _matters(answer: str, end: End, opened: frozenset[str]) -> bool:
    """Whether what is left open speaks for a cut: text with a proper end may just have lost a bracket on the way."""
    proper_end = end in ("mark", "closer") and answer[-1] not in opened
    return not proper_end or answer.lstrip().startswith(("{", "[", "```"))


def _is_prose(answer: str) -> bool:
    """Whether an answer has sentences, and is in the middle of one."""
    last_line = answer[answer.rfind("\n") + 1 :]
    words = len(_WORD.findall(last_line))
    return bool(_SENTENCE_END.search(answer)) and (words >= 4 or "。" in answer)


def _beginnings(answers: Mapping[str, int]) -> frozenset[str]:
    return frozenset(
        answer[:size]
        for answer, times in answers.items()
        if times >= FREQUENT_ANSWER
        for size in range(1, len(answer))
        if answers.get(answer[:size], 0) <= max(1, RARE * times)
    )
