"""Whether a model got worse: the same rows, asked of the weights before and of those now.

That the same rows are asked takes out how hard they are, so it doesn't matter which rows came, or in which order.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CLEAR = 2.0
"""Standard errors of the rows' mean difference."""
WORSE_BY, WORSE_SHARE = 0.5, 0.1
"""Worse: so many nats a token above the loss before, and this share of it more. A run at a lively rate may be half a
nat off for a while and come back by itself."""

HIGHER_BY = 0.05
"""Nats a token."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The rows' mean losses (nats per trained token) before and now, and how sure their difference is."""

    before: float
    now: float
    error: float = 0.0
    """Standard error of the mean difference."""
    rows: int = 1

    @property
    def is_worse(self) -> bool:
        """Whether going back would be better without a doubt."""
        if not math.isfinite(self.now):
            return True
        rise = self.now - self.before
        return rise > WORSE_BY + WORSE_SHARE * self.before and rise > CLEAR * self.error

    @property
    def is_clearly_higher(self) -> bool:
        """Whether the loss is higher now, beyond chance and beyond what is worth a word."""
        if not self.has_rows or not math.isfinite(self.before):
            return False
        return not math.isfinite(self.now) or self.now - self.before > max(HIGHER_BY, CLEAR * self.error)

    @property
    def has_rows(self) -> bool:
        """Whether anything was asked."""
        return self.rows > 0

    @property
    def is_as_good(self) -> bool:
        """Whether the weights now are as good a place to come back to."""
        return self.now <= self.before + self.error


def compare(before: Sequence[float], now: Sequence[float]) -> Verdict:
    """Hold the losses of the same rows against each other. Without a row, or where ``before`` is no number, nothing got
    worse."""
    if not before or not all(map(math.isfinite, before)):
        return Verdict(math.inf, 0.0, rows=len(before))
    rises = [late - early for early, late in zip(before, now, strict=True)]
    known = len(rises) > 1 and all(map(math.isfinite, rises))
    error = statistics.stdev(rises) / math.sqrt(len(rises)) if known else 0.0
    return Verdict(statistics.fmean(before), statistics.fmean(now), error, len(rises))
