"""From a range test's curve to candidates."""

import math

from hypothesis import given
from hypothesis import strategies as st

from manylora.training.rate.curve import Curve, has_blown_up, round_rate, smooth
from manylora.training.rate.trials import Trial, halving

RATES = tuple(1e-6 * 10 ** (step / 12) for step in range(60))


def valley(at: float) -> Curve:
    """A loss that falls to its lowest at rate ``at`` and rises from there."""
    return Curve(RATES, tuple(2.0 + 0.2 * abs(math.log10(rate / at)) for rate in RATES))


def test_candidates_lie_below_the_rate_at_which_the_loss_turns() -> None:
    curve = valley(1e-3)
    found = curve.candidates()
    assert 5e-4 < curve.edge < 5e-3
    assert len(found) == 5
    assert list(found) == sorted(found)
    assert max(found) == round_rate(curve.edge / 1.5)
    assert max(found) / min(found) > 10


def test_a_loss_that_never_turns_leaves_the_largest_rate_in() -> None:
    curve = Curve(RATES, tuple(3.0 - 0.01 * step for step in range(60)))
    assert not curve.has_turned
    assert max(curve.candidates()) == round_rate(RATES[-1])


@given(st.lists(st.floats(0.01, 20), min_size=2, max_size=60))
def test_candidates_are_rates_of_the_test_whatever_the_losses(losses: list[float]) -> None:
    found = Curve(RATES[: len(losses)], tuple(losses)).candidates()
    assert len(set(found)) == 5
    assert all(0 < rate <= 2 * RATES[len(losses) - 1] for rate in found)


def test_the_mean_starts_at_the_first_loss_and_forgets() -> None:
    assert smooth([4.0])[0] == 4.0
    assert smooth([4.0] * 10 + [1.0] * 20)[-1] < 1.01


def test_a_test_ends_when_the_loss_blows_up() -> None:
    assert not has_blown_up([])
    assert not has_blown_up([3.0, 2.5, 2.0])
    assert has_blown_up([3.0, 2.0, float("nan")])
    assert has_blown_up([3.0, 2.0, 9.0, 9.0])
    # Three times the lowest, and still far below where it began.
    assert not has_blown_up([20.0, *[1.0] * 8, *[3.0] * 4])


def test_halving_drops_the_worse_half_and_doubles_the_steps() -> None:
    asked: list[tuple[float, int]] = []

    def run(rate: float, steps: int) -> Trial:
        asked.append((rate, steps))
        return Trial(rate, steps, abs(rate - 3.0))

    found = list(halving((1.0, 2.0, 3.0, 4.0, 5.0), 10, run))
    assert [steps for _, steps in asked] == [10] * 5 + [20] * 3
    assert min(found, key=lambda each: (-each.steps, each.loss)).rate == 3.0
