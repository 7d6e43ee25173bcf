"""Arrivals have the rate and the coefficient of variation that were asked for, and are the same for a seed."""

from itertools import pairwise
from statistics import mean, stdev

import pytest

from manylora.loadtest.bench.arrivals import Arrivals


def gaps(arrivals: Arrivals, seed: int) -> list[float]:
    return [after - before for before, after in pairwise([0.0, *arrivals.times(20_000, seed)])]


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_gaps_have_their_mean_and_spread(cv: float) -> None:
    drawn = gaps(Arrivals(5.0, cv), seed=3)
    # The mean of n gaps lies within cv/√n of theirs: 4 such deviations.
    assert mean(drawn) == pytest.approx(0.2, rel=4 * cv / 20_000**0.5)
    assert stdev(drawn) / mean(drawn) == pytest.approx(cv, rel=0.1)
    assert min(drawn) >= 0


def test_a_poisson_process_is_memoryless_and_a_burst_is_not() -> None:
    """Of exponential gaps 1/e are longer than the mean; with cv 4 most are far shorter."""
    assert sum(gap > 0.2 for gap in gaps(Arrivals(5.0), 1)) / 20_000 == pytest.approx(0.368, abs=0.015)
    assert sum(gap < 0.02 for gap in gaps(Arrivals(5.0, 4.0), 1)) > 14_000


def test_cv_0_is_a_metronome() -> None:
    assert Arrivals(4.0, 0.0).times(3, 9) == [0.25, 0.5, 0.75]


def test_a_seed_says_which() -> None:
    one = Arrivals(2.0, 2.0)
    assert one.times(50, 7) == one.times(50, 7)
    assert one.times(50, 7) != one.times(50, 8)


@pytest.mark.parametrize(("rate", "cv"), [(0, 1), (-1, 1), (float("inf"), 1), (1, -1), (1, float("nan"))])
def test_what_cannot_be_drawn_is_refused(rate: float, cv: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Arrivals(rate, cv)
