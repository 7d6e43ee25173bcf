"""What a range test's curve says: from which learning rate on a run learns, and from which on it falls apart.

Rules that take a point of the curve as it is (fastai's valley, Lightning's steepest slope) overshoot with Adam; so here
the curve only bounds the candidates, and held-out loss decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SMOOTHING = 0.6
"""Of the exponential mean over losses; with its bias taken out."""
BLOWN_UP = 1.5
"""A smoothed loss this many times the lowest, or this far above the first, ends the test."""
CANDIDATES = 5
BELOW_EDGE = 1.5
"""The largest candidate is this factor below the rate at which the loss turns up. With 3, a task of the demo ended at
2.4 times the eval loss of a higher rate; what is too high for more than a few steps, the trials find out."""
SPAN = 30.0
"""From the smallest candidate to the largest."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A range test: the loss at each rate, in the order of the rates."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The losses' exponential mean."""
        return smooth(self.losses)

    @property
    def edge(self) -> float:
        """The rate at which the smoothed loss is lowest, after which it rises: the largest of use."""
        values = self.smoothed
        return self.rates[min(range(len(values)), key=values.__getitem__)]

    def candidates(self, count: int = CANDIDATES) -> tuple[float, ...]:
        """Return rates to try, rising: evenly spaced in their logarithm, up to somewhat below the edge."""
        top = self.edge / BELOW_EDGE if self.has_turned else self.edge
        bottom = top / SPAN
        step = (top / bottom) ** (1 / max(count - 1, 1))
        return tuple(round_rate(bottom * step**index) for index in range(count))

    @property
    def has_turned(self) -> bool:
        """Whether the loss rose again within the test."""
        values = self.smoothed
        return bool(values) and values[-1] > min(values) * 1.05


def smooth(losses: Sequence[float]) -> tuple[float, ...]:
    """Return the bias-corrected exponential mean of ``losses``."""
    found: list[float] = []
    mean = 0.0
    for count, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**count))
    return tuple(found)


def has_blown_up(losses: Sequence[float]) -> bool:
    """Return whether the test need not go on: not a number, or far above the best."""
    if not losses:
        return False
    if not math.isfinite(losses[-1]):
        return True
    values = smooth(losses)
    return values[-1] > BLOWN_UP * min(values) and values[-1] > values[0]


def round_rate(rate: float) -> float:
    """Round to two digits: nobody means more."""
    return float(f"{rate:.1e}")
