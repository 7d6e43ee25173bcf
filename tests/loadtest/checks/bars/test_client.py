"""The bars' client reads answers, metrics and failures as they are."""

from manylora.loadtest.checks.bars.client import Answer, Metrics
from manylora.loadtest.checks.bars.report import Report

EXPOSITION = """\
# HELP manylora_kv_blocks KV blocks
# TYPE manylora_kv_blocks gauge
manylora_kv_blocks{state="free"} 10.0
manylora_kv_blocks{state="used"} 2.0
manylora_requests_total{adapter="a/b",outcome="finished"} 3.0
manylora_requests_running 1.0
"""


def test_metrics_are_added_up_by_label() -> None:
    metrics = Metrics.parse(EXPOSITION)
    assert metrics.total("manylora_kv_blocks") == 12
    assert metrics.total("manylora_kv_blocks", 'state="used"') == 2
    assert metrics.total("manylora_requests_total", 'adapter="a/b"', 'outcome="finished"') == 3
    assert metrics.total("manylora_requests_running") == 1
    assert metrics.total("manylora_nothing") == 0


def test_answers_are_the_same_only_if_complete_and_equal_to_the_last_bit() -> None:
    one = Answer("ab", ["a", "b"], [-1.0, -2.0], "length")
    assert one.same_as(Answer("ab", ["a", "b"], [-1.0, -2.0], "length"))
    assert not one.same_as(Answer("ab", ["a", "b"], [-1.0, -2.0000001], "length"))
    assert not one.same_as(Answer("ab", ["ab"], [-1.0], "length"))
    failed = Answer(error="broken")
    assert not failed.same_as(Answer(error="broken"))


def test_a_report_without_cases_has_not_passed() -> None:
    empty, none = Report("empty"), Report("none")
    none.share("all of nothing", 0, 0)
    assert not empty.passed
    assert not none.passed
    none.checks.clear()
    none.share("all", 2, 2)
    assert none.passed
