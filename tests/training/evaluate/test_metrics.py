"""What counts as a right answer."""

import math

import pytest

from manylora.training.errors import InvalidArgument
from manylora.training.evaluate.metrics import MetricKind, judge, perplexity, share_right


@pytest.mark.parametrize(
    ("kind", "pattern", "answer", "expected", "right"),
    [
        ("exact", None, " SELECT 1;\n", "SELECT 1;", True),
        ("exact", None, "select 1;", "SELECT 1;", False),
        ("exact", None, "", "x", False),
        ("regex", r"^\d{4}$", "2026", "anything", True),
        ("regex", r"^\d{4}$", "in 2026", "anything", False),
        ("regex", None, "the answer is 42.", r"\b42\b", True),
        ("regex", None, "the answer is 421.", r"\b42\b", False),
        ("regex", r"a.b", "a\nb", "", True),
        ("json", None, '{"a": [1, null]}', "", True),
        ("json", None, "null", "", True),
        ("json", None, '```json\n{"a": 1}\n```', "", True),
        ("json", None, 'Here it is: {"a": 1}', "", False),
        ("json", None, '{"a": NaN}', "", False),
        ("json", None, "[" * 100_000, "", False),
        ("json", None, "", "", False),
        ("json_equal", None, '{"b": 2.0, "a": [true]}', '{ "a" : [true], "b": 2 }', True),
        ("json_equal", None, '{"a": 1}', '{"a": true}', False),
        ("json_equal", None, "[1, 2]", "[2, 1]", False),
        ("json_equal", None, "not json", "not json", False),
    ],
)
def test_answers_are_judged(
    kind: MetricKind, pattern: str | None, answer: str, expected: str, right: bool
) -> None:
    assert judge(kind, pattern)(answer, expected) is right


def test_bad_requests_are_refused_in_one_line() -> None:
    with pytest.raises(InvalidArgument, match="not a regular expression"):
        judge("regex", "(")
    with pytest.raises(InvalidArgument, match="not a regular expression"):
        judge("regex")("x", "(")
    with pytest.raises(InvalidArgument, match="pattern is for the metric 'regex'"):
        judge("exact", "x")
    with pytest.raises(InvalidArgument, match="no metric 'bleu': use one of exact"):
        judge("bleu")  # type: ignore[arg-type]


def test_shares_and_perplexity() -> None:
    assert share_right(judge("exact"), ["a", "b", "c", "d"], ["a", "x", "c", "y"]) == 0.5
    with pytest.raises(InvalidArgument, match="no held-out example"):
        share_right(judge("exact"), [], [])
    assert perplexity(0.0) == 1.0
    assert perplexity(2.0) == pytest.approx(math.e**2)
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))
