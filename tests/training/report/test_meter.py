"""The numbers of the live display: losses, rates and the time that is left."""

import io
import math

import pytest
from rich.console import Console

from manylora.training.report.meter import RunMeter
from manylora.training.report.panel import panel


def drawn(meter: RunMeter) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as caught:
        console.print(panel(meter))
    return caught.get()


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_time_left_follows_the_pace_of_this_process_alone(clock: Clock) -> None:
    meter = RunMeter(clock)
    meter.begin(500, 1000, 3)
    assert meter.seconds_left is None
    for step in range(501, 511):
        clock.seconds += 2
        meter.step_ended(step, None, 0)
    assert meter.seconds_left == pytest.approx(490 * 2)
    clock.seconds += 30  # an evaluation
    assert meter.seconds_left == pytest.approx(490 * 2 - 30)
    assert meter.elapsed == 50


def test_the_first_loss_is_its_own_mean_and_later_ones_pull_slowly(clock: Clock) -> None:
    meter = RunMeter(clock)
    meter.logged({"loss": 5.0, "learning_rate": 1e-4, "grad_norm": 0.5, "epoch": 0.1})
    assert meter.smoothed_loss == pytest.approx(5.0)
    meter.logged({"loss": 1.0})
    assert meter.loss == 1.0
    assert 1.0 < (meter.smoothed_loss or 0) < 5.0
    assert (meter.learning_rate, meter.gradient_norm, meter.epoch) == (1e-4, 0.5, 0.1)


def test_a_loss_that_is_no_number_does_not_stay_in_the_mean(clock: Clock) -> None:
    meter = RunMeter(clock)
    for loss in (2.0, math.nan, math.inf, 2.0):
        meter.logged({"loss": loss})
    assert meter.smoothed_loss == pytest.approx(2.0)
    assert len(meter.losses) == 4


def test_rates_come_from_totals_or_as_they_are_logged(clock: Clock) -> None:
    meter = RunMeter(clock)
    meter.begin(0, 10, None)
    meter.step_ended(0, None, 100)
    meter.logged({"trained_tokens": 10})
    clock.seconds = 4.0
    meter.step_ended(1, None, 900)
    meter.logged({"trained_tokens": 50})
    assert meter.tokens_per_second == pytest.approx(200)
    assert meter.trained_tokens_per_second == pytest.approx(10)
    meter.logged({"tokens_per_second": 7.0, "trained_tokens_per_second": 3.0, "rank": 16})
    assert (meter.tokens_per_second, meter.trained_tokens_per_second, meter.rank) == (7.0, 3.0, 16)


def test_an_evaluation_keeps_metrics_and_drops_timings(clock: Clock) -> None:
    meter = RunMeter(clock)
    meter.step, meter.evaluating = 40, (3, 9)
    meter.evaluated({"eval_loss": 1.5, "eval_exact_match": 0.25, "eval_runtime": 3.0, "epoch": 1.0, "x": "y"})
    assert meter.evaluation == {"loss": 1.5, "exact match": 0.25}
    assert meter.evaluated_at == 40
    assert "evaluation at step 40  loss 1.5  exact match 0.25" in drawn(meter)
