"""Answers that stop where the others don't. What a whole answer looks like is learnt from the data set itself.

A set of labels ends every answer with a letter and a set of essays with a full stop; so an answer is judged beside
those that answer the same sort of prompt or begin the same way.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from training.check.texts import RowText

End = Literal["mark", "closer", "letter", "digit", "open", "other"]
_MARKS = frozenset(".!?。！？…;；؟।॥")
_CLOSERS = frozenset(")]}\"'”’»」』）】》`*_~|>$")
_OPEN = frozenset(",，、:：([{<«“‘-–—=+&/\\（「")
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ("（", "）"), ("「", "」"), ("“", "”"), ("«", "»"))
_WORD = re.compile(r"[^\W\d_]+")
UNUSUAL = 0.04
"""An end that a smaller share of comparable answers has speaks for a cut."""
FEWEST = 40
"""Answers that a group must have to be judged by."""
COMMON_WORD = 40
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
    return "letter" if last.isalpha() else "digit" if last.isdigit() else "other"


def unclosed(answer: str) -> bool:
    """Whether a bracket, a quote or a block of code is opened and not closed."""
    if any(answer.count(opening) > answer.count(closing) for opening, closing in _PAIRS):
        return True
    return answer.count("```") % 2 == 1 or answer.count('"') % 2 == 1


def _head(text: str) -> str:
    return " ".join(text[:80].casefold().split()[:2])


def _script(answer: str) -> str:
    """A coarse name of the writing: its first letter's block."""
    for character in answer[:40]:
        if character.isalpha():
            return "latin" if character < "\u0250" else f"U+{ord(character) >> 8:02x}"
    return "none"


def groups_of(row: RowText) -> Iterator[str]:
    """The groups whose habits an answer is judged by, closest first."""
    script, answer_head, prompt_head = _script(row.answer), _head(row.answer), _head(row.prompt)
    first = answer_head.split(" ")[0]
    shape = "short" if len(row.answer) < 24 else "long"
    yield f"{script}|{prompt_head}|{first}|{shape}"
    yield f"{script}|{first}|{shape}|answer"
    yield f"{script}|{prompt_head}|{shape}|prompt"
    yield f"{script}|{row.system[:60]}|{shape}|system"
    yield f"{script}|{shape}"


@dataclass(frozen=True, slots=True)
class Habits:
    """How a group's answers end."""

    answers: int
    ends: Mapping[End, int]
    unclosed: int


@dataclass(frozen=True, slots=True)
class Endings:
    """How a data set's answers end."""

    groups: Mapping[str, Habits]
    words: Mapping[str, int]
    """How often a word stands in an answer."""
    last_words: Mapping[str, int]
    beginnings: frozenset[str]
    """Proper beginnings of common words."""
    beginnings_of_answers: frozenset[str]
    """Proper beginnings of answers that are given again and again, such as labels."""

    @classmethod
    def learn(cls, rows: Iterable[RowText]) -> "Endings":
        """Read a sample of whole and, some of them, cut answers."""
        ends: dict[str, Counter[End]] = defaultdict(Counter)
        open_ones: Counter[str] = Counter()
        words: Counter[str] = Counter()
        last_words: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        for row in rows:
            end, is_open = end_of(row.answer), unclosed(row.answer)
            for group in groups_of(row):
                ends[group][end] += 1
                open_ones[group] += is_open
            found = _WORD.findall(row.answer)
            words.update(found)
            last_words.update(found[-1:])
            if len(row.answer) <= 80:
                answers[row.answer.strip()] += 1
        groups = {
            name: Habits(total, dict(counts), open_ones[name])
            for name, counts in ends.items()
            if (total := counts.total()) >= FEWEST
        }
        common = [word for word, times in words.most_common(30_000) if times >= 5]
        return cls(
            groups,
            {word: times for word, times in words.items() if times > 1},
            dict(last_words),
            frozenset(word[:size] for word in common for size in range(1, len(word))),
            frozenset(
                answer[:size]
                for answer, times in answers.items()
                if times >= FREQUENT_ANSWER
                for size in range(1, len(answer))
                if answers[answer[:size]] < 3
            ),
        )

    def cut_off(self, row: RowText) -> bool:
        """Whether an answer seems to stop before its end."""
        answer = row.answer.rstrip()
        habits = next((self.groups[name] for name in groups_of(row) if name in self.groups), None)
        if not answer or habits is None:
            return False
        if unclosed(answer) and habits.unclosed < UNUSUAL * habits.answers:
            return True
        end = end_of(answer)
        if end in ("mark", "closer"):
            return False
        if habits.ends.get(end, 0) < UNUSUAL * habits.answers:
            return True
        return answer in self.beginnings_of_answers or (end == "letter" and self._broken_word(answer))

    def _broken_word(self, answer: str) -> bool:
        """Whether the last word is the beginning of another, or one that no answer ends with."""
        last = _WORD.findall(answer)[-1:]
        if not last:
            return False
        word = last[0]
        if self.last_words.get(word, 0) > 1:
            return False
        times = self.words.get(word, 0)
        return times >= COMMON_WORD or (times <= 1 and word in self.beginnings)
