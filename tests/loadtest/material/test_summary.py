"""Percentiles and tables."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.loadtest.material.summary import Spread, percentile
from manylora.loadtest.material.text_table import milliseconds, text_table


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.9) == pytest.approx(4.6)
    assert percentile([7.0], 0.99) == 7.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_a_spread_is_in_order_and_in_range(values: list[float]) -> None:
    spread = Spread.of(values)
    slack = 1e-6
    assert (
        min(values) - slack <= spread.p50 <= spread.p90 + slack <= spread.p99 + 2 * slack <= max(values) + 1
    )
    assert min(values) - slack <= spread.mean <= max(values) + slack
    assert spread.count == len(values)


def test_nothing_is_nan_and_null_in_json() -> None:
    spread = Spread.of([])
    assert math.isnan(spread.p50)
    assert json.dumps(spread.to_json()) == '{"count": 0, "mean": null, "p50": null, "p90": null, "p99": null}'


def test_a_table_is_aligned() -> None:
    lines = text_table(["name", "ms"], [["a", "1"], ["longer", "1234"]]).splitlines()
    assert lines == ["name      ms", "──────  ────", "a          1", "longer  1234"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.00123, "1.23"), (0.0123, "12.3"), (1.5, "1500"), (math.nan, "–")]
)
def test_milliseconds(seconds: float, shown: str) -> None:
    assert milliseconds(seconds) == shown
