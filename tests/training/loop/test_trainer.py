"""Runs: resumed equals unbroken, memory that runs out, losses that run away, disks that are full."""

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.adapters.durable import sync
from manylora.training.errors import Diverged, DoesNotFit
from manylora.training.loop import checkpoints
from manylora.training.loop.trainer import LoopSettings, LoraTrainer
from tests.training.loop.making import items, losses, make_trainer, tiny_base, weights


@pytest.mark.parametrize("schedule", [None, "8:0,16:0.5"])
@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_run_that_was_killed_and_resumed_equals_the_unbroken_one_bit_for_bit(
    tmp_path: Path, schedule: str | None, stop_at: int
) -> None:
    options: dict[str, Any] = {
        "rank_schedule": schedule,
        "dropout": 0.1,
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": stop_at,
        "warmup_steps": 2,
    }
    whole = make_trainer(tiny_base(tmp_path), tmp_path / "whole", items(24), **options)
    whole.train()
    broken = make_trainer(tiny_base(tmp_path), tmp_path / "broken", items(24), **options)
    broken.events.listeners.append(lambda event: None)
    broken.train()
    # What a kill leaves: the checkpoint, none after it.
    for path in checkpoints.checkpoints(tmp_path / "broken"):
        if checkpoints.step_of(path) != stop_at:
            shutil.rmtree(path)
    resumed = make_trainer(tiny_base(tmp_path), tmp_path / "broken", items(24), **options)
    torch.manual_seed(999)  # the state comes from the checkpoint, not from how the process began
    resumed.train(resume_from_checkpoint=str(checkpoints.last_checkpoint(tmp_path / "broken")))
    assert losses(resumed) == losses(whole)
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


class Drawing(LoraTrainer):
    """A trainer that draws a number from each generator in every step."""

    drawn: list[tuple[float, float, float]]

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        self.drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return super().training_step(*args, **named)


def test_a_resumed_run_goes_on_with_every_generator_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Drawing)
    drawn = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-3")):
        trainer: Any = make_trainer(
            tiny_base(tmp_path), tmp_path / "run", items(24), save_strategy="steps", save_steps=3
        )
        trainer.drawn = []
        trainer.train(resume_from_checkpoint=checkpoint)
        drawn.append(trainer.drawn)
    whole, resumed = drawn
    assert len(resumed) == 3
    assert resumed == whole[3:]


class Forgetful(LoraTrainer):
    """A trainer on a machine where more than two rows at once don't fit."""

    def compute_loss(self, model: Any, inputs: Mapping[str, Tensor], *args: Any, **named: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **named)
        if inputs["input_ids"].shape[0] > 2:
            torch.autograd.backward(loss, retain_graph=True)  # part of the work is done when memory runs out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }
    whole = make_trainer(tiny_base(tmp_path), tmp_path / "whole", items(48), **options)
    whole.train()
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Forgetful)
    small = make_trainer(tiny_base(tmp_path), tmp_path / "small", items(48), **options)
    small.train()
    assert small.micro_rows == 2
    assert [event.kind for event in small.events.all] == ["split", "split"]
    assert small.masked.drawn == whole.masked.drawn == 48  # what failed is counted once, as the guard sees it
    assert losses(small) == pytest.approx(losses(whole), abs=1e-5)


def test_one_row_that_does_not_fit_ends_the_run_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hopeless(LoraTrainer):
        def compute_loss(self, *args: Any, **named: Any) -> Tensor:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            )

    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Hopeless)
    trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(8))
    with pytest.raises(DoesNotFit, match="gradient_checkpointing"):
        trainer.train()


class Exploding(LoraTrainer):
    """A trainer whose gradients are not numbers from its fifth step on, so often."""

    times = 1

    def compute_loss(self, *args: Any, **named: Any) -> Tensor:
        loss = super().compute_loss(*args, **named)
        if self.state.global_step >= 4 and self.times:
            self.times -= 1
            return loss * float("nan")
        return loss


def test_nan_goes_back_to_the_last_good_state_at_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Exploding)
    trainer = make_trainer(
        tiny_base(tmp_path), tmp_path / "run", items(40), max_steps=10, lr_scheduler_type="constant"
    )
    trainer.train()
    assert [event.kind for event in trainer.events.all] == ["backoff"]
    assert "half the rate" in trainer.events.all[0].sentence
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == 1e-3
    assert rates[-1] == 5e-4


def test_nan_that_does_not_go_away_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exploding, "times", 100)
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Exploding)
    trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), max_steps=20)
    with pytest.raises(Diverged, match="after 3 steps back"):
        trainer.train()


def test_a_run_can_be_told_to_stop_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Exploding)
    trainer = make_trainer(
        tiny_base(tmp_path), tmp_path / "run", items(40), settings=LoopSettings(on_divergence="stop")
    )
    with pytest.raises(Diverged, match="step 5"):
        trainer.train()


ZIP_WRITER = "[enforce fail at inline_container.cc:672] . unexpected pos 280000 vs 279892"
"""What torch.save said on a full tmpfs."""


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), RuntimeError(ZIP_WRITER)])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = make_trainer(
        tiny_base(tmp_path), tmp_path / "run", items(40), save_strategy="steps", save_steps=2
    )
    real = sync

    def full(path: Path) -> None:
        if trainer.state.global_step == 4:
            raise error
        real(path)

    monkeypatch.setattr(checkpoints, "sync", full)
    trainer.train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-6",
    ]
    assert not (tmp_path / "run" / checkpoints.STAGING).exists()
    why = "it took only a part of a file" if isinstance(error, RuntimeError) else os.strerror(28)
    assert why in trainer.events.all[0].sentence


def test_checkpoints_are_ordinary_adapters_and_the_best_is_kept(tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_base(tmp_path),
        tmp_path / "run",
        items(40),
        eval_data=items(8, seed=5),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "run"
    assert (best / "adapter_config.json").is_file()
    assert (best / "adapter_model.safetensors").is_file()
    assert trainer.state.best_metric == min(
        entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    )


class ForgetfulLater(LoraTrainer):
    """A trainer whose memory runs out in the second micro-batch of its first window."""

    passes = 0

    def compute_loss(self, model: Any, inputs: Mapping[str, Tensor], *args: Any, **named: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **named)
        self.passes += 1
        if self.passes == 2:
            torch.autograd.backward(loss, retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


def test_what_a_window_had_done_when_memory_ran_out_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    norms = []
    for kind in (LoraTrainer, ForgetfulLater):
        monkeypatch.setattr("tests.training.loop.making.LoraTrainer", kind)
        trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(8), **options)
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
