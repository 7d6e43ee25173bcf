"""Which adapter each request of a workload names: pure, seeded functions. Knows no server and no clock.

Names are those of the papers and tools that coined them; where two of them mean different things by one word, the
docstring of each function says whose meaning it is.
"""

import math
import random
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

PUNICA_BASE = 1.5
MIXTURE = "mixture"
"""`distinct` over mixtures of the adapters, not over these: what these are is loadtest/bench/mixed_models.py's."""


class PopularityError(ValueError):
    """The text names no popularity."""


def identical(requests: int, adapters: int, rng: random.Random) -> list[int]:
    """Every request names adapter 0 (Punica's "identical")."""
    return [0] * requests


def distinct(requests: int, adapters: int, rng: random.Random) -> list[int]:
    """Request i names adapter i mod ``adapters`` (SGLang's "distinct").

    With as many adapters as requests each has its own, which is Punica's "distinct".
    """
    return [number % adapters for number in range(requests)]


def uniform(requests: int, adapters: int, rng: random.Random) -> list[int]:
    """Each request names any adapter with the same chance (SGLang's "uniform", S-LoRA's α = 1)."""
    return [rng.randrange(adapters) for _ in range(requests)]


def skewed(requests: int, adapters: int, rng: random.Random) -> list[int]:
    """Adapter i is drawn with a chance ∝ 1.5^−i, i from 0 (SGLang's "skewed")."""
    return _draw([PUNICA_BASE**-i for i in range(adapters)], requests, rng)


def zipf(alpha: float, requests: int, adapters: int, rng: random.Random) -> list[int]:
    """Adapter i is drawn with a chance ∝ 1/(i + 1)^α: Zipf's law over ranks. α = 0 is uniform."""
    return _draw([(i + 1) ** -alpha for i in range(adapters)], requests, rng)


def power(alpha: float, requests: int, adapters: int, rng: random.Random) -> list[int]:
    """Adapter ⌊adapters · x⌋, x with density α·x^(α−1) on [0, 1] (S-LoRA's trace): α = 1 is uniform, less is
    more skewed towards adapter 0."""
    # The inverse of the distribution function x^α.
    return [min(adapters - 1, int(adapters * rng.random() ** (1 / alpha))) for _ in range(requests)]


def punica_uniform(requests: int, adapters: int, rng: random.Random) -> list[int]:
    """⌈√requests⌉ adapters (at most those there are), as equal shares as can be, shuffled (Punica's "uniform")."""
    used = min(adapters, math.isqrt(requests - 1) + 1 if requests else 1)
    chosen = [number % used for number in range(requests)]
    rng.shuffle(chosen)
    return chosen


def punica_skewed(requests: int, adapters: int, rng: random.Random) -> list[int]:
    """The k-th adapter, k from 0, has ⌊1.5^k⌋ requests and the last one the rest, shuffled.

    This is Punica's "skewed", which its code calls zipf:1.5; the shares are geometric, not Zipf's.
    """
    chosen: list[int] = []
    for adapter in range(adapters):
        left = requests - len(chosen)
        share = left if adapter == adapters - 1 else min(left, int(PUNICA_BASE**adapter))
        chosen += [adapter] * share
        if len(chosen) == requests:
            break
    rng.shuffle(chosen)
    return chosen


Plain = Callable[[int, int, random.Random], list[int]]
Scaled = Callable[[float, int, int, random.Random], list[int]]
PLAIN: Mapping[str, Plain] = {
    "identical": identical,
    "same": identical,
    "distinct": distinct,
    MIXTURE: distinct,
    "uniform": uniform,
    "skewed": skewed,
    "punica-uniform": punica_uniform,
    "punica-skewed": punica_skewed,
}
SCALED: Mapping[str, Scaled] = {"zipf": zipf, "power": power}
NAMES = (*PLAIN, *(f"{name}:ALPHA" for name in SCALED))


@dataclass(frozen=True, slots=True)
class Popularity:
    """A checked choice: one of PLAIN, or one of SCALED with its α."""

    name: str
    alpha: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Popularity":
        """Read "uniform", "zipf:1.1" and the like. Raises PopularityError naming what there is."""
        name, colon, number = text.partition(":")
        if name in PLAIN and not colon:
            return cls(name)
        if name not in SCALED:
            raise PopularityError(f"popularity {text!r} is none of {', '.join(NAMES)}")
        try:
            alpha = float(number)
        except ValueError:
            raise PopularityError(f"{text!r}: ALPHA is a number, as in {name}:1.0") from None
        least_is_allowed = name == "zipf"
        if not math.isfinite(alpha) or alpha < 0 or (alpha == 0 and not least_is_allowed):
            raise PopularityError(f"{text!r}: ALPHA must be {'0 or more' if least_is_allowed else 'above 0'}")
        return cls(name, alpha)

    def __str__(self) -> str:
        return self.name if self.alpha is None else f"{self.name}:{self.alpha:g}"

    def assign(self, requests: int, adapters: int, seed: int) -> list[int]:
        """Return the adapter, 0 to ``adapters`` − 1, of each of ``requests`` requests. The same for the same seed."""
        if adapters < 1:
            raise PopularityError("there must be at least one adapter or base model to ask")
        rng = random.Random(seed)
        if self.alpha is None:
            return PLAIN[self.name](requests, adapters, rng)
        return SCALED[self.name](self.alpha, requests, adapters, rng)


def _draw(weights: list[float], count: int, rng: random.Random) -> list[int]:
    sums = list(accumulate(weights))
    return [min(len(sums) - 1, bisect(sums, rng.random() * sums[-1])) for _ in range(count)]
