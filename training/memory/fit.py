"""--auto_fit: change a run by the plan until it should fit, try its longest batch, and change it more if it doesn't."""

from collections.abc import Callable
from dataclasses import dataclass

from manylora.training.errors import DoesNotFit
from manylora.training.loop.out_of_memory import is_out_of_memory
from manylora.training.memory.plan import GIB, plan
from manylora.training.memory.remedies import remedies, smallest
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

__all__ = ["Fit", "auto_fit", "fit_by_plan", "is_out_of_memory"]

SAFE_SHARE = 0.9
"""Of what was planned, after it ran out of memory: how much it missed isn't known."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A run that fits."""

    run: RunShape
    sentences: tuple[str, ...]
    """What was changed and why, and what was measured."""
    peak_bytes: int
    """Of the trial."""


def fit_by_plan(model: ModelShape, run: RunShape, budget_bytes: int) -> tuple[RunShape, tuple[str, ...]]:
    """Return the run with the cheapest remedies that get it in by the plan, and a sentence if there were any.

    Raises DoesNotFit when none do.
    """
    planned = plan(model, run).total_gib
    if planned * GIB <= budget_bytes:
        return run, ()
    found = remedies(model, run, budget_bytes)
    if not found:
        least = plan(model, smallest(model, run)).total_gib
        raise DoesNotFit(
            f"the run needs {planned:.1f} GiB of {budget_bytes / GIB:.1f}, and {least:.1f} with a micro-batch of one, "
            "checkpointing, 4 bits and the shortest sequences: take a smaller base or more memory"
        )
    best = found[0]
    sentence = (
        f"--auto_fit: {planned:.1f} GiB are planned and {budget_bytes / GIB:.1f} are there: {best.sentence}; planned "
        f"now: {best.total_gib:.1f} GiB ({best.flags})"
    )
    return best.run, (sentence,)


def auto_fit(model: ModelShape, run: RunShape, budget_bytes: int, attempt: Callable[[RunShape], int]) -> Fit:
    """Return a run that fits, tried.

    ``attempt`` does the longest batch of a run and returns the peak in bytes, or raises an out-of-memory error. It is
    asked again with a tighter run until the peak is within the budget. Raises DoesNotFit when nothing is left to
    change.
    """
    run, sentences = fit_by_plan(model, run, budget_bytes)
    while True:
        peak = _peak_or_none(attempt, run)
        if peak is not None and peak <= budget_bytes:
            tried = f"--auto_fit: the longest batch took {peak / GIB:.2f} GiB of {budget_bytes / GIB:.2f}"
            return Fit(run, (*sentences, tried), peak)
        planned = plan(model, run).total_gib * GIB
        # What the plan would have had to say to be right about this run.
        allowed = planned * SAFE_SHARE if peak is None else planned * budget_bytes / peak
        found = remedies(model, run, int(min(allowed, planned - 1)))
        what = "ran out of memory" if peak is None else f"took {peak / GIB:.2f} GiB"
        if not found:
            raise DoesNotFit(
                f"the longest batch {what} with {budget_bytes / GIB:.2f} GiB there, and nothing is left to change: "
                "take a smaller base or more memory"
            )
        run = found[0].run
        sentences += (f"--auto_fit: the longest batch {what}: {found[0].sentence} ({found[0].flags})",)


def _peak_or_none(attempt: Callable[[RunShape], int], run: RunShape) -> int | None:
    """Return the attempt's peak; None when memory ran out. The error, whose frames hold tensors, is gone by then."""
    try:
        return attempt(run)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
