"""When requests of an open loop are due: Gamma or Poisson arrivals, seeded. Knows no clock and no server."""

import math
import random
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Arrivals:
    """``rate`` requests a second whose gaps have the coefficient of variation ``cv``.

    Gaps are Gamma with shape 1/cv² and scale cv²/rate, as in S-LoRA's traces (benchmarks/trace.py): cv 1 is a Poisson
    process, more comes in bursts, 0 is a metronome.
    """

    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what can't be drawn."""
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"a rate of {self.rate:g} requests/s: it must be above 0")
        if not (math.isfinite(self.cv) and self.cv >= 0):
            raise ValueError(f"cv {self.cv:g}: it must be 0 or more")

    def __str__(self) -> str:
        kind = "Poisson" if self.cv == 1 else "evenly spaced" if self.cv == 0 else f"Gamma (cv {self.cv:g})"
        return f"{self.rate:g} requests/s, {kind}"

    def times(self, count: int, seed: int) -> list[float]:
        """Return when each of ``count`` requests is due, in seconds from the beginning. The same for a seed."""
        rng = random.Random(f"{seed}/arrivals")
        square = self.cv * self.cv
        if square == 0:
            gaps = [1 / self.rate] * count
        else:
            gaps = [rng.gammavariate(1 / square, square / self.rate) for _ in range(count)]
        return list(accumulate(gaps))
