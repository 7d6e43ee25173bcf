"""Goodput, fairness and lateness, from answers whose times are known."""

import math

import pytest

from manylora.loadtest.bench.fairness import Fairness, jain
from manylora.loadtest.bench.goodput import Goodput, ServiceLevel
from manylora.loadtest.bench.open_loop import Lateness
from manylora.loadtest.material.answer import Answer


def answered(first: float, each: float, tokens: int = 5, **more: object) -> Answer:
    """An answer asked at 0 whose tokens come ``each`` seconds apart from ``first`` on, and which ends with the last."""
    times = [first + each * number for number in range(tokens)]
    return Answer(0.0, times[-1], ["x"] * tokens, times, finish_reason="length", **more)  # type: ignore[arg-type]


def test_a_request_keeps_to_all_of_its_limits_or_not() -> None:
    level = ServiceLevel.parse("ttft:500, tpot:100,e2e:1000")
    assert (level.ttft, level.tpot, level.e2e) == (0.5, 0.1, 1.0)
    assert level.met_by(answered(0.5, 0.1))
    assert not level.met_by(answered(0.6, 0.1))
    assert not level.met_by(answered(0.1, 0.11))
    assert not level.met_by(answered(0.4, 0.1, tokens=8))
    assert not level.met_by(answered(0.1, 0.1, error="cut off"))
    assert ServiceLevel.parse("e2e:1000").met_by(answered(0.9, 0.001))


def test_waiting_counts_from_when_a_request_was_due() -> None:
    """A client that falls behind must not make the server look fast."""
    late = answered(0.5, 0.1, due=-2.0)
    assert late.first_token_seconds == 2.5
    assert late.seconds == pytest.approx(2.9)
    assert not ServiceLevel.parse("ttft:500").met_by(late)


def test_goodput_counts_failures_as_missed() -> None:
    answers = (
        [answered(0.1, 0.01)] * 6 + [answered(3.0, 0.01)] * 2 + [answered(0.1, 0.01, error="http 500")] * 2
    )
    good = Goodput.of(ServiceLevel.parse("ttft:1000"), answers, seconds=4.0)
    assert (good.met, good.attainment, good.per_second) == (6, 0.6, 1.5)


@pytest.mark.parametrize("text", ["", "ttft", "ttft:0", "ttft:x", "speed:3", "ttft:1,ttft:2", "ttft:1,"])
def test_what_is_no_level_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no limit in ms"):
        ServiceLevel.parse(text)


def test_jain_s_index() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain([1.0, 3.0]) == pytest.approx(0.8)
    assert math.isnan(jain([]))


def test_the_worst_served_is_named_and_failures_count_against_it() -> None:
    asked = [("quick", answered(0.1, 0.1))] * 3 + [("slow", answered(1.0, 0.5)), ("slow", answered(1.0, 0.5))]
    fair = Fairness.of([*asked, ("broken", answered(0.1, 0.1, error="cut off"))])
    assert [share.model for share in fair.shares] == ["broken", "slow", "quick"]
    assert fair.worst is not None
    assert (fair.worst.failed, fair.worst.speed) == (1, 0)
    assert fair.shares[1].speed == pytest.approx(10 / 6)
    assert fair.index == pytest.approx(jain([0, 10 / 6, 10]))


def test_lateness_is_told_from_one_in_a_hundred_on() -> None:
    def sent(late: float) -> Answer:
        return Answer(late, 1.0, due=0.0)

    assert Lateness.of([Answer(0.0, 1.0)]) is None
    few = Lateness.of([sent(0.0)] * 99 + [sent(0.5)])
    many = Lateness.of([sent(0.0)] * 98 + [sent(0.5)] * 2)
    assert few is not None
    assert many is not None
    assert (few.late, few.verdict) == (1, None)
    assert "2 of 100 requests over 10 ms late" in str(many.verdict)
