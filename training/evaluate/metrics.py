"""Metrics of generated text: does an answer match its reference, a pattern, or the grammar of JSON."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from manylora.training.errors import InvalidArgument

MetricKind = Literal["exact", "regex", "json", "json_equal"]
KINDS: tuple[MetricKind, ...] = get_args(MetricKind)
METRIC_NAMES: dict[MetricKind, str] = {
    "exact": "exact_match",
    "regex": "regex_match",
    "json": "json_valid",
    "json_equal": "json_equal",
}
"""The name of each kind's share of right answers; the trainer's metric has `eval_` before it."""
FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)
"""A Markdown code block that is the whole answer, as chat models like to give JSON."""

Judge = Callable[[str, str], bool]
"""Says whether an answer (first) is right, given its reference (second)."""


def judge(kind: MetricKind, pattern: str | None = None) -> Judge:
    """Return what judges an answer.

    exact: the same text, white space at both ends aside. regex: ``pattern``, or without one the reference itself,
    is found in the answer. json: the answer is one JSON value (in a code block or not). json_equal: it is the
    reference's value, whatever the order of keys and the white space.
    Raises InvalidArgument for a pattern that isn't one, or that nothing would use.
    """
    if pattern is not None and kind != "regex":
        raise InvalidArgument(f"a pattern is for the metric 'regex', not for {kind!r}")
    if kind == "exact":
        return lambda answer, expected: answer.strip() == expected.strip()
    if kind == "json":
        return lambda answer, expected: _parsed(answer) is not None
    if kind == "json_equal":
        return _same_json
    if kind == "regex":
        return _searcher(pattern)
    raise InvalidArgument(f"there is no metric {kind!r}: use one of {', '.join(KINDS)}")


def _searcher(pattern: str | None) -> Judge:
    if pattern is None:
        return lambda answer, expected: compiled(expected).search(answer) is not None
    given = compiled(pattern)
    return lambda answer, expected: given.search(answer) is not None


def compiled(pattern: str) -> re.Pattern[str]:
    """Return the pattern ready for use. Raises InvalidArgument with what is wrong with it."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InvalidArgument(f"{pattern!r} is not a regular expression: {error}") from None


def share_right(judged: Judge, answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers that are right. There must be at least one."""
    if not answers:
        raise InvalidArgument("there is no held-out example to evaluate on")
    right = sum(judged(answer, reference) for answer, reference in zip(answers, references, strict=True))
    return right / len(answers)


def perplexity(loss: float) -> float:
    """Return exp of a mean cross-entropy in nats; infinite where a float can't hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class _NoJson(ValueError):
    """NaN and Infinity, which Python reads and JSON doesn't have."""


def _parsed(text: str) -> tuple[object] | None:
    """Return the JSON value of a text in a tuple of one, since null is a value too; None where it has none."""
    fenced = FENCE.match(text.strip())

    def refuse(name: str) -> object:
        raise _NoJson(name)

    try:
        return (json.loads(fenced[1] if fenced else text, parse_constant=refuse),)
    except (ValueError, RecursionError):
        return None


def _same_json(answer: str, expected: str) -> bool:
    mine, theirs = _parsed(answer), _parsed(expected)
    if mine is None or theirs is None:
        return False
    return _canonical(mine[0]) == _canonical(theirs[0])


def _canonical(value: object) -> str:
    # By text and not by ==, for which true equals 1; numbers that are equal are written alike.
    return json.dumps(_numbers_alike(value), sort_keys=True)


def _numbers_alike(value: object) -> object:
    if isinstance(value, dict):
        return {key: _numbers_alike(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_alike(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
