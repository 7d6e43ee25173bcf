"""Percentiles of what was measured. Plain arithmetic on lists of numbers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of ``ordered`` lies, between two neighbours by proportion.

    NaN if there is nothing.
    """
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in five numbers, in the unit of what went in; NaN where nothing did."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Summarise ``values``."""
        ordered = sorted(values)
        mean = math.fsum(ordered) / len(ordered) if ordered else math.nan
        return cls(len(ordered), mean, *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)))

    def to_json(self) -> dict[str, float | int | None]:
        """Return the numbers; null for NaN, which JSON doesn't have."""
        values = {"mean": self.mean, "p50": self.p50, "p90": self.p90, "p99": self.p99}
        return {"count": self.count, **{k: None if math.isnan(v) else v for k, v in values.items()}}
