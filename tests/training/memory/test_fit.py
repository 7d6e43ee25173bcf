"""Changing a run until it fits: by the plan, then by trying."""

import pytest
import torch

from manylora.training.errors import DoesNotFit
from manylora.training.memory.fit import auto_fit, fit_by_plan
from manylora.training.memory.plan import GIB, plan
from manylora.training.memory.run_shape import RunShape
from tests.training.memory.test_remedies import MODEL, RUN


def test_a_run_that_fits_by_plan_stays_and_is_tried_once() -> None:
    tried: list[RunShape] = []

    def attempt(run: RunShape) -> int:
        tried.append(run)
        return 50 * GIB

    fit = auto_fit(MODEL, RUN, 80 * GIB, attempt)
    assert (fit.run, tried) == (RUN, [RUN])
    assert fit.sentences == ("--auto_fit: the longest batch took 50.00 GiB of 80.00",)


def test_the_plan_changes_the_run_before_anything_is_tried() -> None:
    run, (sentence,) = fit_by_plan(MODEL, RUN, 24 * GIB)
    assert plan(MODEL, run).total_gib <= 24
    assert run.global_batch == RUN.global_batch
    assert "--per_device_train_batch_size" in sentence


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_an_attempt_that_runs_out_of_memory_is_followed_by_a_tighter_one(error: Exception) -> None:
    tried: list[RunShape] = []

    def attempt(run: RunShape) -> int:
        tried.append(run)
        if run.batch > 1:
            raise error
        return GIB

    fit = auto_fit(MODEL, RUN, 80 * GIB, attempt)
    assert fit.run.batch == 1
    assert {run.global_batch for run in tried} == {RUN.global_batch}
    assert [run.batch for run in tried] == sorted((run.batch for run in tried), reverse=True)
    assert len(fit.sentences) == len(tried)


def test_a_peak_over_the_budget_corrects_the_plan() -> None:
    """Everything takes half as much again as planned: the next run is planned that much smaller."""
    fit = auto_fit(MODEL, RUN, 40 * GIB, lambda run: int(1.5 * plan(MODEL, run).total_gib * GIB))
    assert 1.5 * plan(MODEL, fit.run).total_gib <= 40


def test_other_errors_pass() -> None:
    def attempt(run: RunShape) -> int:
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes"):
        auto_fit(MODEL, RUN, 80 * GIB, attempt)


def test_what_can_not_fit_is_said() -> None:
    with pytest.raises(DoesNotFit, match=r"take a smaller base"):
        fit_by_plan(MODEL, RUN, 2 * GIB)

    def attempt(run: RunShape) -> int:
        raise MemoryError

    with pytest.raises(DoesNotFit, match="nothing is left to change"):
        auto_fit(MODEL, RUN, 80 * GIB, attempt)
