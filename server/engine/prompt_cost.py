"""What a token of a prompt takes beside a step's decodes, by how many tokens come before it: from measured times.

Each attends to all that come before: with 4,000 of them it takes three times as long as with none. So a straight line
is laid through what tokens took at different places, each step counting as much as it had tokens. What was measured at
one place is kept until more is known of that place, whatever is asked elsewhere meanwhile.

A step may cost something for having a prompt at all, however short: on a GPU it is told op by op where one of decodes
is a recording. That is told from what its tokens take by steps of different lengths at the same place.
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
DIFFERENT = 0.1
"""Spread of steps' lengths, relative and squared, at which half is believed of what they say of the step itself."""
MOST_OF_STEP = 0.9
"""Of what steps took, the most that may be theirs and not their tokens': free tokens would be without end."""
MANY = 1 << 30
"""Tokens: as many as there are."""


@dataclass(slots=True)
class _Sums:
    """Of steps, newer ones counting more."""

    steps: float = 0.0
    seconds: float = 0.0
    tokens: float = 0.0
    contexts: float = 0.0
    """Of each token those that come before it, added up."""
    steps_squared: float = 0.0
    """A token's share of its step is 1 / tokens; the square of it, each token counted."""
    shared: float = 0.0
    """That share times what the token took."""

    def add(self, other: "_Sums", kept: float) -> None:
        """Count what there is so much, and add."""
        for name in self.__slots__:
            setattr(self, name, kept * getattr(self, name) + getattr(other, name))

    def spread(self) -> tuple[float, float]:
        """Return how far tokens' shares of their steps lie apart, and how what they took goes with that."""
        return (
            self.steps_squared - self.steps**2 / self.tokens,
            self.shared - self.steps * self.seconds / self.tokens,
        )


class PromptCost:
    """Takes in what steps took; says what a chunk of a prompt will."""

    def __init__(self) -> None:
        self._few = _Sums()
        """Of steps with so few tokens that they say nothing by themselves."""
        self._by_place: dict[int, _Sums] = {}
        self.of_step = 0.0
        """Seconds that a step takes for having any prompt."""
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
        self._few.add(_Sums(1.0, seconds, tokens, contexts), 1.0)
        if self._few.tokens < TOLD:
            return
        told, self._few = self._few, _Sums()
        told.steps_squared = told.steps**2 / told.tokens
        told.shared = told.steps * told.seconds / told.tokens
        place = int(told.contexts / told.tokens / NEAR).bit_length()
        self._by_place.setdefault(place, _Sums()).add(told, 1 - 1 / MEMORY)
        self._part_the_step()
        self._lay_line()

    def seconds(self, start: int, length: int) -> float:
        """Return what a chunk takes, beside what its step does."""
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

    def _part_the_step(self) -> None:
        """Tell what the step takes from what its tokens do. Steps of one length say nothing: what was known is kept."""
        places = self._by_place.values()
        spreads = [sums.spread() for sums in places]
        apart, together = (sum(each) for each in zip(*spreads, strict=True))
        if apart <= 0.0:
            return
        # Relative to the shares themselves: lengths that hardly differ tell noise.
        relative = apart / sum([sums.steps**2 / sums.tokens for sums in places])
        told = max(0.0, together / apart)
        self.of_step += (told - self.of_step) * relative / (relative + DIFFERENT)
        most = min([sums.seconds / sums.steps for sums in places])
        self.of_step = max(0.0, min(self.of_step, MOST_OF_STEP * most))

    def _lay_line(self) -> None:
        """Least squares; neither end may be below nothing."""
        points = [
            (
                sums.contexts / sums.tokens,
                (sums.seconds - self.of_step * sums.steps) / sums.tokens,
                sums.tokens,
            )
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
