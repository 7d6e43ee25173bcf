"""What counts of a peer's answers, and when a bar is met."""

import math

import pytest

from manylora.loadtest.bench.peers.scenes import BARS, LLAMA, OURS, VLLM, Bar, Measured, bars_table


def measured(ms: float = 10.0, total: float = 50.0, first: float = 0.5, streams: int = 8) -> Measured:
    return Measured(ms / 1000, total, first, streams, 0)


def test_figures_are_in_their_units() -> None:
    one = measured(ms=20, total=300, first=0.25, streams=8)
    assert [one.figure(name) for name in ("ms", "decode", "total", "first")] == [20, 400, 300, 250]


def test_a_report_of_bench_serve_is_taken_by_request() -> None:
    given = [(0.01, None), (0.03, None), (None, None), (0.02, None), (9.0, "cut off")]
    samples = [{"between_tokens_seconds": value, "error": error} for value, error in given]
    report = {
        "samples": samples,
        "tokens_per_second": 70,
        "first_token_seconds": {"p50": None},
        "errors": {"cut off": 1},
    }
    one = Measured.of_serve(report, 4)
    assert (one.seconds_per_token, one.total, one.errors) == (0.02, 70.0, 1)
    assert math.isnan(one.first)
    assert one.figure("decode") == 200


def test_times_are_compared_by_their_ratio_or_by_how_often_they_fit() -> None:
    results = {
        (OURS, "s"): measured(ms=7, first=0.5),
        (LLAMA, "s"): measured(ms=10, first=2.0),
        (VLLM, "s"): measured(ms=5, first=9.0),
    }
    assert Bar("s", "ms", ((LLAMA, "s"),), 0.7, at_most=True).ratio(results) == pytest.approx(0.7)
    assert Bar("s", "first", ((LLAMA, "s"),), 2).ratio(results) == pytest.approx(4)
    better = Bar("s", "decode", ((LLAMA, "s"), (VLLM, "s")), 1)
    assert better.ratio(results) == pytest.approx(5 / 7), "beside the better of the two"
    assert not better.met(better.ratio(results))
    assert math.isnan(Bar("s", "ms", (("peft", "s"),), 1).ratio(results))
    assert Bar("s", "ms", (), 0.7, at_most=True).met(0.7)
    assert not Bar("s", "ms", (), 0.7, at_most=True).met(0.71)


def test_bars_of_what_was_measured_are_shown() -> None:
    results = {
        (OURS, "8, base"): measured(ms=20),
        (OURS, "8, each its own"): measured(ms=24, total=200),
        (VLLM, "8, each its own"): measured(total=30),
        (LLAMA, "8, base"): measured(ms=70),
    }
    lines = bars_table(results).splitlines()[2:]
    assert len(lines) == 4
    assert "3.50" in lines[0]
    assert lines[0].endswith("met")
    assert "6.67" in lines[1]
    assert lines[1].endswith("met")
    assert lines[2].endswith("–")
    assert "manylora's 8, base" in lines[3]
    assert "0.83" in lines[3]
    assert lines[3].endswith("met")
    assert len(BARS) == 11
