"""--auto_fit: change a run by the plan until it should fit, try its longest batches, and change it more if they don't.

It never cuts examples by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from manylora.training.errors import DoesNotFit
from manylora.training.loop.out_of_memory import is_out_of_memory
from manylora.training.memory.plan import GIB, MemoryPlan, plan
from manylora.training.memory.remedies import remedies, smallest
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

__all__ = ["Fit", "auto_fit", "fit_by_plan", "fit_evaluation", "is_out_of_memory"]

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


def fit_by_plan(
    model: ModelShape, run: RunShape, budget_bytes: int, shortest: int | None = None
) -> tuple[RunShape, tuple[str, ...]]:
    """Return the run with the remedies that change its results least and get it in, and a sentence if there were any.

    Examples are cut to no fewer tokens than ``shortest``; None: not at all. Raises DoesNotFit when nothing that is
    allowed gets it in.
    """
    planned = plan(model, run).total_gib
    if planned * GIB <= budget_bytes:
        return run, ()
    found = remedies(model, run, budget_bytes, shortest=shortest)
    if not found:
        raise DoesNotFit(
            f"the run needs {planned:.1f} GiB of {_what_would_do(model, run, budget_bytes, shortest)}"
        )
    best = found[0]
    sentence = (
        f"--auto_fit: {planned:.1f} GiB are planned and {budget_bytes / GIB:.1f} are there: {best.sentence}; planned "
        f"now: {best.total_gib:.1f} GiB ({best.flags})"
    )
    return best.run, (sentence,)


def _what_would_do(model: ModelShape, run: RunShape, budget_bytes: int, shortest: int | None) -> str:
    """Say what is left when nothing that is allowed gets a run in: cutting examples, or else nothing."""
    least = plan(model, smallest(model, run, shortest)).total_gib
    needed = (
        f"{budget_bytes / GIB:.1f}, and {least:.1f} with a micro-batch of one, checkpointing, 4 bits, double "
        f"quantisation"
        f"{'' if shortest is None else f' and examples cut at {shortest} tokens'}"
    )
    cutting = remedies(model, run, budget_bytes)
    if not cutting:
        return f"{needed}: take a smaller base or more memory"
    length = cutting[0].run.longest
    return (
        f"{needed}. Examples cut at {length} tokens instead of {run.longest} would fit, which --auto_fit leaves to "
        f"you: give --model_max_length {length} (or --auto_fit_cut {length}), a smaller base or more memory"
    )


def auto_fit(
    model: ModelShape,
    run: RunShape,
    budget_bytes: int,
    attempt: Callable[[RunShape], int],
    shortest: int | None = None,
) -> Fit:
    """Return a run that fits, tried.

    ``attempt`` does the longest batch of a run and returns the peak in bytes, or raises an out-of-memory error. It is
    asked again with a tighter run until the peak is within the budget. Raises DoesNotFit when nothing is left to
    change that is allowed: examples are cut to no fewer tokens than ``shortest``; None: not at all.
    """
    run, sentences = fit_by_plan(model, run, budget_bytes, shortest)
    while True:
        peak = _peak_or_none(attempt, run)
        if peak is not None and peak <= budget_bytes:
            tried = f"--auto_fit: the longest batch took {peak / GIB:.2f} GiB of {budget_bytes / GIB:.2f}"
            return Fit(run, (*sentences, tried), peak)
        training = replace(run, eval_seq=0)
        allowed = _corrected(plan(model, training), budget_bytes, peak)
        found = remedies(model, training, allowed, shortest=shortest)
        what = "ran out of memory" if peak is None else f"took {peak / GIB:.2f} GiB"
        if not found:
            cutting = () if shortest else remedies(model, training, allowed)
            cut = f"examples cut by --model_max_length {cutting[0].run.longest}, " if cutting else ""
            raise DoesNotFit(
                f"the longest batch {what} with {budget_bytes / GIB:.2f} GiB there, and nothing is left to change "
                f"that --auto_fit changes: take {cut}a smaller base or more memory"
            )
        run = _with_evaluation_of(run, found[0].run)
        sentences += (f"--auto_fit: the longest batch {what}: {found[0].sentence} ({found[0].flags})",)


def _corrected(planned: MemoryPlan, budget_bytes: int, peak: int | None) -> int:
    """Return what the plan would have to say of a run that takes the budget, if it is as wrong about it as it was.

    What a process holds before it has a model is the same whatever is changed.
    """
    fixed = sum(planned.parts.get(name, 0.0) for name in ("context", "kernels")) * GIB
    beyond = planned.total_gib * GIB - fixed
    share = SAFE_SHARE if peak is None else max(0.0, budget_bytes - fixed) / max(1.0, peak - fixed)
    return int(fixed + min(beyond * share, beyond - 1))


def _with_evaluation_of(run: RunShape, changed: RunShape) -> RunShape:
    """Return ``changed`` with the held-out examples of ``run``, cut as those are that are trained on."""
    is_cut = changed.seq < run.seq
    return replace(changed, eval_seq=min(run.eval_seq, changed.seq) if is_cut else run.eval_seq)


def fit_evaluation(run: RunShape, budget_bytes: int, attempt: Callable[[RunShape], int]) -> Fit:
    """Return the run with an evaluation batch that fits, tried: its loss is the same whatever the batch.

    ``attempt`` evaluates a run's longest held-out batch, as auto_fit's trains. Raises DoesNotFit when one row doesn't
    fit.
    """
    sentences: tuple[str, ...] = ()
    while True:
        peak = _peak_or_none(attempt, run)
        if peak is not None and peak <= budget_bytes:
            tried = f"--auto_fit: the longest evaluation batch took {peak / GIB:.2f} GiB of {budget_bytes / GIB:.2f}"
            return Fit(run, (*sentences, tried), peak)
        what = "ran out of memory" if peak is None else f"took {peak / GIB:.2f} GiB"
        if run.eval_batch == 1:
            raise DoesNotFit(
                f"the longest held-out example, of {run.eval_seq} tokens, {what} with {budget_bytes / GIB:.2f} GiB "
                "there: leave it out of the eval data, or take a smaller --model_max_length or more memory"
            )
        rows, run = run.eval_batch, replace(run, eval_batch=run.eval_batch // 2)
        sentences += (
            f"--auto_fit: the longest evaluation batch {what}: {rows} → {run.eval_batch} rows, the same loss "
            f"(--per_device_eval_batch_size {run.eval_batch})",
        )


def _peak_or_none(attempt: Callable[[RunShape], int], run: RunShape) -> int | None:
    """Return the attempt's peak; None when memory ran out. The error, whose frames hold tensors, is gone by then."""
    try:
        return attempt(run)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
