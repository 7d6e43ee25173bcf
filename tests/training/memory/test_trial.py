"""Trying the longest batch: its peak, and nothing left behind."""

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manylora.training.memory.trial import longest_rows, try_batch, try_longest, try_longest_evaluation
from tests.training.loop.making import items, losses, make_trainer, tiny_base, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_after_trials_is_the_run_without_any(tmp_path: Path, checkpointing: bool) -> None:
    data = items(24)
    runs = []
    for tried in (False, True):
        base = tiny_base(tmp_path)
        trainer = make_trainer(
            base,
            tmp_path / "out",
            data,
            dropout=0.1,
            activation_checkpointing=checkpointing,
            eval_data=data[:6],
        )
        before = weights(trainer)
        if tried:
            peak = try_longest(trainer, [len(each["input_ids"]) for each in data])
            assert peak > 100 << 20  # a process with torch in it
            trainer.model.train()
            assert try_longest_evaluation(trainer, [len(each["input_ids"]) for each in data[:6]]) > 0
            assert trainer.model.training
            after = weights(trainer)
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert trainer.optimizer is None
        trainer.train()
        runs.append((losses(trainer), weights(trainer)))
    (plain, ended), (after_trial, also_ended) = runs
    assert plain == after_trial
    assert all(torch.equal(ended[name], also_ended[name]) for name in ended)


def test_an_evaluation_is_tried_whole_on_the_longest_rows_without_gradients(tmp_path: Path) -> None:
    data = items(24)
    lengths = [len(each["input_ids"]) for each in data]
    trainer = make_trainer(
        tiny_base(tmp_path), tmp_path / "out", data[:2], eval_data=data, per_device_eval_batch_size=5
    )
    seen: list[tuple[torch.Size, bool, bool]] = []

    def look(module: nn.Module, _: object, given: Mapping[str, Tensor]) -> None:
        seen.append((given["input_ids"].shape, module.training, torch.is_grad_enabled()))

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    try_longest_evaluation(trainer, lengths)
    assert seen == [(torch.Size((5, max(lengths))), False, False)]


def test_a_trial_that_runs_out_of_memory_puts_everything_back() -> None:
    model = nn.Linear(4, 4).eval()
    value = model.weight.detach().clone()
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), _numpy_state()
    calls = 0

    def loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(3), random.random(), np.random.rand()
        if calls == 2:  # after a step
            raise torch.OutOfMemoryError("CUDA out of memory")
        total: Tensor = module(batch["x"]).sum()
        return total

    with pytest.raises(torch.OutOfMemoryError):
        try_batch(model, lambda trained: torch.optim.AdamW(trained, lr=1.0), {"x": torch.ones(2, 4)}, loss)
    assert torch.equal(model.weight, value)
    assert model.weight.grad is None
    assert not model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert _numpy_state() == states[2]


def _numpy_state() -> str:
    return repr(np.random.get_state(legacy=True))


def test_the_longest_rows_are_taken() -> None:
    data = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 9, 5, 7)]
    rows = longest_rows(data, [3, 9, 5, 7], 2)
    assert [len(row["input_ids"]) for row in rows] == [9, 7]
