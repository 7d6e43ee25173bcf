"""What a token of a prompt takes beside a step's decodes, by how many tokens come before it: from measured times.

Each attends to all that come before: with 4,000 of them it takes three times as long as with none. So a straight line
is laid through what tokens took at different places, each step counting as much as it had tokens. What was measured at
one place is kept until more is known of that place, whatever is asked elsewhere meanwhile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Chunk = tuple[int, int]
"""Where a chunk of a prompt begins, and its length; tokens."""
MEMORY = 16
"""Steps that an average reaches back, about."""
TOLD = 8
"""Prompt tokens that together say what they cost: steps with fewer are taken together."""
NEAR = 256
"""Tokens before a chunk that count as few: places are told apart by twice, four times, … as many."""
MANY = 1 << 30
"""Tokens: as many as there are."""


@dataclass(slots=True)
class _Sums:
    """Of steps, newer ones counting more."""

    seconds: float = 0.0
    tokens: float = 0.0
    contexts: float = 0.0
    """Of each token those that come before it, added up."""

    def add(self, other: "_Sums", kept: float) -> None:
        """Count what there is so much, and add."""
        self.seconds = kept * self.seconds + other.seconds
        self.tokens = kept * self.tokens + other.tokens
        self.contexts = kept * self.contexts + other.contexts


class PromptCost:
    """Takes in what steps took; says what a chunk of a prompt will."""

    def __init__(self) -> None:
        self._few = _Sums()
        """Of steps with so few tokens that they say nothing by themselves."""
        self._by_place: dict[int, _Sums] = {}
        self._first = 0.0
        """Seconds of a token that has none before it."""
        self._slope = 0.0
        """And so many more for each that it has."""
        self._known = float(NEAR)
        """Up to so many tokens before a chunk the line holds."""

    @property
    def measured(self) -> bool:
        """Whether anything is known."""
        return bool(self._by_place)

    def note(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """Note a step's chunks and what they took in all."""
        tokens = sum([length for _, length in chunks])
        contexts = sum([length * (start + length / 2) for start, length in chunks])
        self._few.add(_Sums(seconds, tokens, contexts), 1.0)
        if self._few.tokens < TOLD:
            return
        told, self._few = self._few, _Sums()
        place = int(told.contexts / told.tokens / NEAR).bit_length()
        self._by_place.setdefault(place, _Sums()).add(told, 1 - 1 / MEMORY)
        self._lay_line()

    def seconds(self, start: int, length: int) -> float:
        """Return what a chunk takes."""
        return length * self._token(start + length / 2)

    def tokens(self, start: int, seconds: float) -> int:
        """Return how many tokens from ``start`` on take no longer than that; a great many where nothing is known."""
        seconds, each = max(0.0, seconds), self._token(start)
        if each <= 0.0 and self._slope <= 0.0:
            return MANY
        if each <= 0.0:  # what they take, they take for each other alone
            return int(min(MANY, math.sqrt(2 * seconds / self._slope)))
        most = seconds / each
        # They have each other before them too: with half of these it is too few.
        least = seconds / self._token(start + most / 2)
        return int(min(MANY, math.sqrt(least * most)))

    def _token(self, context: float) -> float:
        """Return what a token takes with so many before it."""
        # Where nothing was measured twice as many take twice as long at most.
        known = min(context, self._known)
        return (self._first + self._slope * known) * max(1.0, context / self._known)

    def _lay_line(self) -> None:
        """Least squares; neither end may be below nothing."""
        points = [
            (sums.contexts / sums.tokens, sums.seconds / sums.tokens, sums.tokens)
            for sums in self._by_place.values()
        ]
        weight = sum([w for _, _, w in points])
        x = sum([w * context for context, _, w in points]) / weight
        y = max(0.0, sum([w * seconds for _, seconds, w in points]) / weight)
        spread = sum([w * (context - x) ** 2 for context, _, w in points])
        together = sum([w * (context - x) * (seconds - y) for context, seconds, w in points])
        slope = max(0.0, together / spread) if spread else 0.0
        self._slope = min(slope, y / x)
        self._first = max(0.0, y - self._slope * x)
        self._known = 2 * max(NEAR / 2, *[context for context, _, _ in points])
