"""What counts as trouble, and what doesn't."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.training.loop.guard import MOST_SKIPPED, Guard, Rows, Trouble


def observe(guard: Guard, losses: list[float], norm: float = 1.0, rows: int = 4) -> list[Trouble]:
    """Steps whose rows all have the step's loss."""
    seen = [guard.observe(Rows.of([loss] * rows), norm) for loss in losses]
    return [trouble for trouble in seen if trouble is not None]


def settled(losses: list[float]) -> Guard:
    guard = Guard(1000)
    observe(guard, losses)
    guard.settle()
    return guard


def test_nan_is_trouble_at_once_and_certain() -> None:
    trouble = Guard(100).observe(Rows.of([math.nan]), 1.0)
    assert trouble is not None
    assert (trouble.kind, trouble.is_fatal, trouble.is_certain) == ("nan", True, True)
    for norm, loss in ((math.inf, None), (1.0, math.nan)):
        found = Guard(100).observe(Rows.of([1.0]), norm, loss=loss)
        assert found is not None
        assert found.is_certain


@pytest.mark.parametrize("norm", [math.inf, math.nan, -1.0], ids=["inf", "nan", "as DeepSpeed says it"])
def test_a_scaled_loss_that_overflows_is_a_skipped_step_and_no_trouble_unless_it_goes_on(norm: float) -> None:
    guard = Guard(100)
    for _ in range(3):
        assert not [
            trouble
            for _ in range(MOST_SKIPPED - 1)
            if (trouble := guard.observe(Rows.of([2.0]), norm, scaled=True)) is not None
        ]
        assert guard.observe(Rows.of([2.0]), 1.0, scaled=True) is None
    found = [guard.observe(Rows.of([2.0]), norm, scaled=True) for _ in range(MOST_SKIPPED)]
    assert found[-1] is not None
    assert "--bf16" in found[-1].sentence


def test_a_level_that_rises_beyond_what_rows_differ_by_is_suspicious_and_one_bad_batch_is_not() -> None:
    guard = settled([2.0, 2.2] * 10)
    assert not observe(guard, [8.0])
    guard = settled([2.0, 2.2] * 10)
    found = observe(guard, [2.9] * 8)
    assert [trouble.kind for trouble in found] == ["exploding"]
    assert not found[0].is_certain
    # The same rise is nothing where rows differ by more.
    mixed = Guard(1000)
    for _ in range(20):
        mixed.observe(Rows.of([0.1, 4.1]), 1.0)
    mixed.settle()
    assert not observe(mixed, [2.9] * 8, rows=2)


def test_a_runaway_norm_is_suspicious_after_three_steps() -> None:
    guard = Guard(1000)
    observe(guard, [2.0 - 0.01 * step for step in range(40)])
    assert not observe(guard, [1.5, 1.5], norm=100.0)
    found = observe(guard, [1.5], norm=100.0)
    assert [trouble.kind for trouble in found] == ["runaway"]
    assert not found[0].is_certain


def test_a_flat_loss_is_said_once_and_is_not_fatal() -> None:
    found = observe(Guard(100), [2.0] * 100)
    assert [trouble.kind for trouble in found] == ["flat"]
    assert not found[0].is_fatal


def test_a_loss_that_falls_or_has_nothing_left_to_fall_or_comes_of_other_rows_is_not_flat() -> None:
    assert not observe(Guard(100), [2.0 - 0.01 * step for step in range(100)])
    assert not observe(Guard(100), [0.05] * 100)
    assert not observe(Guard(100), [1.0] * 40 + [3.0] * 60)


def test_a_step_without_a_trained_token_is_not_looked_at() -> None:
    guard = Guard(100)
    assert guard.observe(Rows(), 0.0) is None
    assert guard.seen == 0


@given(st.lists(st.floats(0.1, 3.0), min_size=0, max_size=80), st.lists(st.floats(0.1, 3.0), max_size=20))
def test_a_restored_guard_goes_on_as_the_one_it_was_taken_of(before: list[float], after: list[float]) -> None:
    guard = Guard(100)
    observe(guard, before[: len(before) // 2])
    guard.settle()
    observe(guard, before[len(before) // 2 :])
    again = Guard.restore(json.loads(json.dumps(guard.state())))
    again.total_steps = 100
    assert observe(again, after) == observe(guard, after)
    assert again.state() == guard.state()


def test_after_a_step_back_norms_are_those_of_other_weights() -> None:
    guard = Guard()
    assert observe(guard, [1.0] * 40, norm=1.0) == []
    guard.forget_recent()
    assert observe(guard, [1.0] * 10, norm=100.0) == []


def test_a_level_that_was_found_to_be_well_is_the_one_that_the_next_is_held_against() -> None:
    guard = Guard()
    assert observe(guard, [1.0] * 30) == []
    observe(guard, [3.0] * 8)
    guard.settle()
    assert observe(guard, [3.0] * 16) == []


def test_a_rise_is_held_against_what_rows_differ_by_now_and_not_long_ago() -> None:
    guard = Guard()
    for _ in range(200):
        guard.observe(Rows.of([0.1, 4.1, 0.1, 4.1]), 1.0)
    observe(guard, [1.0] * 300)
    guard.settle()
    observe(guard, [1.0] * 8)
    guard.settle(only_lower=True)
    assert [trouble.kind for trouble in observe(guard, [1.5] * 8)][-1:] == ["exploding"]
