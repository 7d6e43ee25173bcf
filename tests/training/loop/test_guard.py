"""What counts as trouble, and what doesn't."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from manylora.training.loop.guard import Guard, Trouble


def observe(guard: Guard, losses: list[float], norm: float = 1.0) -> list[Trouble]:
    return [trouble for loss in losses if (trouble := guard.observe(loss, norm)) is not None]


def test_nan_is_trouble_at_once() -> None:
    trouble = Guard(100).observe(math.nan, 1.0)
    assert trouble is not None
    assert trouble.kind == "nan"
    assert trouble.is_fatal
    second = Guard(100).observe(1.0, math.inf)
    assert second is not None
    assert "norm" in second.sentence


def test_a_loss_that_explodes_is_trouble_and_one_bad_batch_is_not() -> None:
    guard = Guard(1000)
    assert not observe(guard, [2.0] * 20 + [8.0] + [2.0] * 5)
    found = observe(guard, [9.0] * 5)
    assert found
    assert found[0].kind == "exploding"
    assert "learning rate" in found[0].sentence


def test_a_runaway_norm_is_trouble_after_three_steps() -> None:
    guard = Guard(1000)
    observe(guard, [2.0 - 0.01 * step for step in range(40)])
    assert guard.observe(1.5, 100.0) is None
    assert guard.observe(1.5, 100.0) is None
    found = guard.observe(1.5, 100.0)
    assert found is not None
    assert found.kind == "runaway"


def test_a_flat_loss_is_said_once_and_is_not_fatal() -> None:
    guard = Guard(100)
    found = observe(guard, [2.0] * 100)
    assert [trouble.kind for trouble in found] == ["flat"]
    assert not found[0].is_fatal


def test_a_loss_that_falls_or_has_nothing_left_to_fall_is_not_flat() -> None:
    assert not observe(Guard(100), [2.0 - 0.01 * step for step in range(100)])
    assert not observe(Guard(100), [0.05] * 100)


@given(st.lists(st.floats(0.1, 3.0), min_size=0, max_size=80), st.lists(st.floats(0.1, 3.0), max_size=20))
def test_a_restored_guard_goes_on_as_the_one_it_was_taken_of(before: list[float], after: list[float]) -> None:
    guard = Guard(100)
    observe(guard, before)
    again = Guard.restore(json.loads(json.dumps(guard.state())))
    again.total_steps = 100
    assert observe(again, after) == observe(guard, after)
    assert again.state() == guard.state()
