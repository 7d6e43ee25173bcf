"""Plots: round ticks, values in their places, no spike lost."""

import math
import re

import pytest

from manylora.training.report.axes import Axis, axis_over, round_step, tick_text
from manylora.training.report.charts import Marker, Series, line_chart, smoothed, stacked_bars, thinned


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [3.0, 3.0], [-2.0, 5.0], [1e-7, 3e-4], [0.0, 0.0], [1e9, 2e9], [98.0, 99.0]]
)
@pytest.mark.parametrize("may_be_log", [False, True])
def test_an_axis_holds_all_its_values_and_a_few_round_ticks(values: list[float], may_be_log: bool) -> None:
    axis = axis_over(values, 0, 100, may_be_log=may_be_log)
    assert all(0 <= axis.place(value) <= 100 for value in values)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 11
    assert all(-1e-6 <= axis.place(tick) <= 100 + 1e-6 for tick in ticks)
    assert len({tick_text(tick) for tick in ticks}) == len(ticks)


def test_positive_values_of_many_sizes_get_a_logarithmic_axis() -> None:
    assert axis_over([0.1, 100.0], 0, 1, may_be_log=True).log
    assert not axis_over([0.0, 100.0], 0, 1, may_be_log=True).log
    assert not axis_over([0.1, 100.0], 0, 1).log
    assert Axis(1, 100, 0, 10, log=True).place(10) == pytest.approx(5)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.8), (0.51, 0.74), (1e-4, 3.0), (2.1, 4.9)])
def test_a_logarithmic_axis_has_ticks_however_short(low: float, high: float) -> None:
    ticks = Axis(low, high, 0, 10, log=True).ticks(5)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)


def test_ticks_are_written_short() -> None:
    assert [tick_text(v) for v in (0, 0.25, 0.30000000000000004, 1500, 2e-4, 1.5e-5, 3e8)] == [
        "0", "0.25", "0.3", "1,500", "2e-04", "1.5e-05", "3e+08",
    ]  # fmt: skip
    assert [round_step(step) for step in (0.9, 1.0, 3.0, 70.0)] == [1, 1, 5, 100]


def test_thinning_keeps_both_ends_and_every_spike() -> None:
    points = [(float(x), 1.0) for x in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[77_777] = (77_777.0, -99.0)
    few = thinned(points)
    assert len(few) <= 610
    assert few[0] == points[0]
    assert few[-1] == points[-1]
    assert {99.0, -99.0} <= {y for _, y in few}
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert thinned(points[:5]) == points[:5]


def test_smoothing_follows_a_fall_without_a_lag() -> None:
    falling = [(float(x), math.exp(-x / 50)) for x in range(400)]
    assert max(abs(a[1] - b[1]) for a, b in zip(falling, smoothed(falling), strict=True)) < 0.05
    assert smoothed([(0.0, 2.0)]) == [(0.0, 2.0)]


def test_a_plot_draws_its_lines_marks_and_markers() -> None:
    chart = line_chart(
        "Loss",
        [
            Series("loss", [(1, 3.0), (2, 2.0)], 0),
            Series("eval", [(2, 2.5)], 1, marks=True),
            Series("none", [], 2),
        ],
        [Marker(1, "grew <b>"), Marker(99, "outside")],
    )
    assert chart.count("<path") == 2
    assert chart.count("<circle") == 1
    assert "eval at step 2: 2.5" in chart
    assert "grew &lt;b&gt;" in chart
    assert "outside" not in chart
    assert "none" not in chart
    assert line_chart("Empty", [Series("none", [], 0)]) == ""


def test_scales() -> None:
    wide = [Series("x", [(0, 0.001), (1, 10.0)], 0)]
    assert "logarithmic" not in line_chart("x", wide)
    assert "logarithmic" in line_chart("x", wide, scale="auto")
    assert ">0.8</text>" in line_chart("x", [Series("x", [(0, 0.0), (1, 0.0)], 0)], scale="share")


def test_stairs_hold_their_value_until_the_end() -> None:
    chart = line_chart("Rank", [Series("rank", [(0, 8), (50, 16)], 0, stairs=True)], last_step=100)
    path = re.search(r'd="([^"]+)"', chart)
    assert path is not None
    assert path[1].count("V") == 1
    assert path[1].endswith("H546.0")


def test_bars_are_as_long_as_their_parts() -> None:
    chart = stacked_bars("Memory", {"planned": {"a": 1.0, "b": 3.0}, "measured": {"peak": 2.0}}, "GiB")
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', chart)]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)
    assert "4.00 GiB" in chart
    assert stacked_bars("Memory", {}, "GiB") == ""
    assert stacked_bars("Memory", {"planned": {"a": 0.0}}, "GiB") == ""
