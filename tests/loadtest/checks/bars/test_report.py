"""What a bar found is a pass only if something was measured."""

from manylora.loadtest.checks.bars.report import Report


def test_a_report_without_cases_has_not_passed() -> None:
    empty, none = Report("empty"), Report("none")
    none.share("all of nothing", 0, 0)
    assert not empty.passed
    assert not none.passed
    none.checks.clear()
    none.share("all", 2, 2)
    assert none.passed
