"""Changing a run until it fits: by the plan, then by trying."""

from dataclasses import replace

import pytest
import torch

from manylora.training.errors import DoesNotFit
from manylora.training.memory.fit import auto_fit, fit_by_plan, fit_evaluation
from manylora.training.memory.plan import GIB, plan
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape
from tests.training.memory.test_remedies import MODEL, QWEN25_7B, RUN


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


LONG = RunShape(seq=4096, batch=4)
"""On QWEN25_7B into 16 GiB only with examples cut."""


def test_examples_are_not_cut_unless_that_is_said() -> None:
    with pytest.raises(DoesNotFit, match=r"--model_max_length (\d+) \(or --auto_fit_cut \1\)") as refused:
        fit_by_plan(QWEN25_7B, LONG, 16 * GIB)
    assert "instead of 4096" in str(refused.value)
    with pytest.raises(DoesNotFit, match="--model_max_length"):
        auto_fit(QWEN25_7B, LONG, 16 * GIB, lambda _: pytest.fail("it is not even tried"))
    with pytest.raises(DoesNotFit, match="--auto_fit_cut"):
        fit_by_plan(QWEN25_7B, LONG, 16 * GIB, shortest=4000)
    run, (sentence,) = fit_by_plan(QWEN25_7B, LONG, 16 * GIB, shortest=2048)
    assert 3584 <= run.seq < 4096
    assert f"examples cut at {run.seq} tokens" in sentence


def test_an_attempt_that_fails_cuts_no_examples_either() -> None:
    tried: list[RunShape] = []

    def attempt(run: RunShape) -> int:
        tried.append(run)
        raise MemoryError

    long = replace(RUN, seq=8192)
    with pytest.raises(DoesNotFit, match="--model_max_length"):
        auto_fit(MODEL, long, 80 * GIB, attempt)
    assert {run.seq for run in tried} == {8192}
    tried.clear()
    with pytest.raises(DoesNotFit):
        auto_fit(MODEL, long, 80 * GIB, attempt, shortest=2048)
    assert 2048 <= min(run.seq for run in tried) < 8192


def test_an_attempt_to_train_that_fails_leaves_the_evaluation_as_it_is() -> None:
    """Even where the plan takes the evaluation for the peak."""
    run = RunShape(seq=512, batch=4, eval_seq=4096, eval_batch=8)

    def attempt(wanted: RunShape) -> int:
        if wanted.batch > 1:
            raise MemoryError
        return GIB

    fit = auto_fit(MODEL, run, 80 * GIB, attempt)
    assert fit.run.batch == 1
    assert (fit.run.eval_seq, fit.run.eval_batch) == (4096, 8)


def test_held_out_examples_are_cut_with_those_that_did_not_fit() -> None:
    run = RunShape("qlora", seq=8192, gradient_checkpointing=True, eval_seq=6000, eval_batch=1)

    def attempt(wanted: RunShape) -> int:
        if wanted.seq > 4096:
            raise MemoryError
        return GIB

    fit = auto_fit(MODEL, run, 80 * GIB, attempt, shortest=2048)
    assert 2048 <= fit.run.seq <= 4096
    assert fit.run.eval_seq == fit.run.seq


@pytest.mark.parametrize("grows", [False, True])
def test_an_evaluation_batch_is_halved_until_it_fits(grows: bool) -> None:
    run = RunShape(eval_seq=512, eval_batch=8)
    tried: list[int] = []

    def attempt(wanted: RunShape) -> int:
        tried.append(wanted.eval_batch)
        if not grows and wanted.eval_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return wanted.eval_batch * GIB

    fit = fit_evaluation(run, 2 * GIB, attempt)
    assert (tried, fit.run.eval_batch) == ([8, 4, 2], 2)
    assert fit.run == RunShape(eval_seq=512, eval_batch=2)
    assert "--per_device_eval_batch_size 2" in fit.sentences[-2]
    assert fit.sentences[-1] == "--auto_fit: the longest evaluation batch took 2.00 GiB of 2.00"


def test_an_example_too_long_to_evaluate_is_said() -> None:
    with pytest.raises(DoesNotFit, match=r"held-out example, of 512 tokens, took 3\.00 GiB with 2\.00 GiB"):
        fit_evaluation(RunShape(eval_seq=512, eval_batch=2), 2 * GIB, lambda _: 3 * GIB)


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


def test_what_the_process_holds_anyway_is_no_reason_to_give_up() -> None:
    """A small run in a process whose libraries are most of it: the run is planned smaller, not the libraries."""
    model = ModelShape("llama", 64, 64, 2, 2, 2, 32, 500, True)
    run = RunShape(seq=256, batch=8, rank=4, device="cpu")
    parts = plan(model, run).parts
    libraries = parts["context"] + parts["kernels"]
    assert libraries > 0.9 * plan(model, run).total_gib

    def attempt(wanted: RunShape) -> int:
        if wanted.batch > 4:
            raise MemoryError
        return GIB

    assert auto_fit(model, run, 8 * GIB, attempt).run.batch == 4


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
