"""A run's results as a reader wants them: a number, its unit, and what it was before."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from manylora.training.report.panel import clock
from manylora.training.report.record import RunRecord


@dataclass(frozen=True, slots=True)
class Tile:
    """One result."""

    name: str
    value: str
    note: str = ""


def tiles(record: RunRecord) -> Iterable[Tile]:
    """Yield what was measured, the most important first."""
    results = record.results
    if results.published_step is not None:
        yield Tile("published", f"step {results.published_step}", f"the best of {results.steps or 0:,} steps")
    for name, after in record.evaluation.after.items():
        before = record.evaluation.before.get(name)
        note = "" if before is None else f"{percent(before)} before training"
        yield Tile(readable(name), percent(after), note)
    if results.eval_loss is not None:
        note = "" if results.perplexity is None else f"perplexity {figure(results.perplexity)}"
        yield Tile("eval loss", figure(results.eval_loss), note)
    if results.train_loss is not None:
        yield Tile("train loss", figure(results.train_loss), "mean over the run")
    if results.train_seconds is not None:
        search = record.search
        rate = (
            f"; {clock(search.seconds)} of it for the rate ({search.steps:,} steps)" if search.steps else ""
        )
        yield Tile("time", clock(results.train_seconds + search.seconds), f"{_steps(results.steps)}{rate}")
    if results.tokens_per_second is not None:
        yield Tile("tokens/s", f"{results.tokens_per_second:,.0f}")
    if results.peak_memory_gib is not None:
        planned = record.memory.planned_gib
        yield Tile(
            "peak memory",
            f"{results.peak_memory_gib:.2f} GiB",
            f"{planned:.2f} GiB planned" if planned else "",
        )
    if results.trained_parameters is not None:
        rank = "" if results.final_rank is None else f"rank {results.final_rank}"
        yield Tile("trained parameters", count(results.trained_parameters), rank)


def figure(value: float | None) -> str:
    """Return a number with four digits; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def percent(share: float) -> str:
    """Return a share from 0 to 1 as per cent."""
    return f"{100 * share:.1f} %"


def count(number: int) -> str:
    """Return a number of parameters: 812, 40.4 K, 1.5 M, 7.2 B."""
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def readable(metric: str) -> str:
    """Return a metric's name without its prefix: exact match."""
    return metric.removeprefix("eval_").replace("_", " ")


def _steps(steps: int | None) -> str:
    return "" if steps is None else f"{steps:,} steps"
