"""`manylora bench compare A.json B.json`: what got better or worse from one report to the next, and how surely.

Reports of `bench serve` hold every request: the difference of a figure is then drawn again and again from both sides'
requests (a bootstrap), and a change counts when 95 % of the draws lie beyond the threshold. Figures without samples are
compared as they are. Requests of one run are not wholly independent: an interval says what chance does to the sample,
not what another hour on the machine does.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manylora.loadtest.material.text_table import text_table

DRAWS = 2000
LEAST_SAMPLES = 8
"""Fewer requests on a side are compared as they are."""
INTERVAL = 0.025, 0.975
Report = Mapping[str, Any]
Array = np.ndarray[Any, np.dtype[np.float64]]


class CompareError(ValueError):
    """The reports can't be compared. One line."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of a report."""

    name: str
    path: tuple[str, ...]
    more_is_better: bool = False
    sample: str | None = None
    """The field of each request that it sums up; None: it has none."""
    share: float | None = None
    """Which percentile of the samples it is; None: their mean."""

    def of(self, report: Report) -> float | None:
        """Return it, if the report has it."""
        found: Any = report
        for key in self.path:
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if isinstance(found, int | float) and not math.isnan(found) else None

    def samples(self, report: Report) -> Array | None:
        """Return what it sums up, if the report has enough of that."""
        if self.sample is None:
            return None
        values = [each.get(self.sample) for each in report.get("samples", ()) if each.get("error") is None]
        found = np.array([value for value in values if value is not None], dtype=np.float64)
        return found if len(found) >= LEAST_SAMPLES else None


def _spread(key: str, name: str) -> Iterator[Figure]:
    for part, share in (("p50", 0.5), ("p99", 0.99), ("mean", None)):
        # Gaps between single tokens are not kept, the mean of each request is.
        sample = None if key == "between_tokens_seconds" and share is not None else key
        yield Figure(f"{name}, {part}", (key, part), sample=sample, share=share)


FIGURES = (
    Figure("tokens/s", ("tokens_per_second",), more_is_better=True),
    Figure("requests/s", ("requests_per_second",), more_is_better=True),
    Figure("goodput, requests/s", ("goodput", "requests_per_second"), more_is_better=True),
    *_spread("first_token_seconds", "first token, s"),
    *_spread("between_tokens_seconds", "between tokens, s"),
    *_spread("end_to_end_seconds", "end to end, s"),
    Figure("fairness", ("fairness", "jain_index"), more_is_better=True),
    Figure("overhead of a step", ("decode_steps", "overhead")),
)


@dataclass(frozen=True, slots=True)
class Change:
    """How a figure changed."""

    figure: Figure
    before: float
    after: float
    interval: tuple[float, float] | None
    """Of the relative change, 95 %; None: without samples."""

    @property
    def relative(self) -> float:
        """(after − before) / before; infinite from nothing."""
        if not self.before:
            return math.copysign(math.inf, self.after) if self.after else 0.0
        return (self.after - self.before) / abs(self.before)

    def verdict(self, threshold: float) -> str:
        """Return "worse", "better" or "same": beyond ``threshold`` as a whole, interval and all."""
        low, high = self.interval or (self.relative, self.relative)
        if self.figure.more_is_better:
            low, high = -high, -low
        return "worse" if low > threshold else "better" if high < -threshold else "same"


def load_report(path: Path) -> Report:
    """Read a report that --json wrote. Raises CompareError, OSError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompareError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict) or "bench" not in found:
        raise CompareError(f"{path} is no report of `manylora bench … --json`")
    return found


def changes(before: Report, after: Report, seed: int = 0) -> list[Change]:
    """Return how each figure changed that both have. Raises CompareError for reports of different benchmarks."""
    if before["bench"] != after["bench"]:
        raise CompareError(f"one report is of bench {before['bench']}, the other of bench {after['bench']}")
    found = []
    for figure in FIGURES:
        first, second = figure.of(before), figure.of(after)
        if first is not None and second is not None:
            found.append(Change(figure, first, second, _interval(figure, before, after, seed)))
    if not found:
        raise CompareError("the reports have no figure in common")
    return found


def _interval(figure: Figure, before: Report, after: Report, seed: int) -> tuple[float, float] | None:
    first, second = figure.samples(before), figure.samples(after)
    if first is None or second is None:
        return None
    rng = np.random.default_rng(seed)
    drawn = [_draws(rng, values, figure.share) for values in (first, second)]
    if not drawn[0].all():
        return None
    low, high = np.quantile((drawn[1] - drawn[0]) / np.abs(drawn[0]), INTERVAL)
    return float(low), float(high)


def _draws(rng: np.random.Generator, values: Array, share: float | None) -> Array:
    """Return the figure of DRAWS samples drawn from ``values`` with replacement."""
    summed: Callable[[Array], Any] = np.mean if share is None else lambda drawn: np.quantile(drawn, share)
    size = len(values)
    return np.array([summed(values[rng.integers(0, size, size)]) for _ in range(DRAWS)])


def different_settings(before: Report, after: Report) -> list[str]:
    """Return what was measured differently, in words."""
    found = []
    for part in ("settings", "client"):
        first, second = (dict(_flat(report.get(part, {}))) for report in (before, after))
        for key in sorted(first.keys() | second.keys()):
            ignored = key.startswith(("url", "load_average", "tokenizer"))
            if not ignored and first.get(key) != second.get(key):
                found.append(f"{key}: {first.get(key)} → {second.get(key)}")
    return found


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else key)
    else:
        yield name, value


def table(found: list[Change], threshold: float) -> str:
    """Return the table of changes."""
    rows = []
    for each in found:
        low, high = each.interval or (math.nan, math.nan)
        between = "–" if math.isnan(low) else f"{100 * low:+.1f} … {100 * high:+.1f} %"
        values = (f"{each.before:.4g}", f"{each.after:.4g}", f"{100 * each.relative:+.1f} %")
        rows.append((each.figure.name, *values, between, each.verdict(threshold)))
    return text_table(("", "A", "B", "change", "95 %", ""), rows)
