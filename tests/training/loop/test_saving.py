"""What the class that saves leaves: the best checkpoint where scores are told, under its own name, through rotation."""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from manylora.adapters.durable import sync
from manylora.training.loop import checkpoints
from manylora.training.loop.trainer import LoraTrainer
from tests.training.loop.making import items, make_trainer, tiny_base, weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def told(
    monkeypatch: pytest.MonkeyPatch, directory: Path, losses: Sequence[float], **more: Any
) -> LoraTrainer:
    """A trainer that evaluates and saves every second step, and finds ``losses`` one after the other."""

    class Told(LoraTrainer):
        def evaluation_loop(self, *args: Any, **named: Any) -> Any:
            found = super().evaluation_loop(*args, **named)
            found.metrics["eval_loss"] = losses[self.state.global_step // 2 - 1]
            return found

    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Told)
    options: dict[str, Any] = {
        "max_steps": 2 * len(losses),
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        **more,
    }
    return make_trainer(tiny_base(directory), directory / "run", items(40), eval_data=items(4, 5), **options)


def names(directory: Path) -> list[str]:
    return [path.name for path in checkpoints.checkpoints(directory)]


def saved(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(directory / "adapter_model.safetensors")
    return found


def test_the_best_checkpoint_is_what_the_model_holds_at_the_end_and_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = told(monkeypatch, tmp_path, (3.0, 1.0, 2.0))
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")
    best, last = (saved(tmp_path / "run" / f"checkpoint-{step}") for step in (4, 6))
    trainer.save_model(str(tmp_path / "published"))
    published = saved(tmp_path / "published")
    assert all(torch.equal(published[name], value) for name, value in best.items())
    assert not all(torch.equal(published[name], value) for name, value in last.items())


def test_rotation_never_removes_the_best_whatever_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(names(tmp_path / "run"))

    trainer = told(monkeypatch, tmp_path, (1.0, 3.0, 2.0, 4.0), save_total_limit=2)
    trainer.add_callback(Look())
    trainer.train()
    assert seen == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-2", "checkpoint-6"],
        ["checkpoint-2", "checkpoint-8"],
    ]
    expected = saved(tmp_path / "run" / "checkpoint-2")
    held = weights(trainer)
    assert all(
        torch.equal(held[name.replace(".weight", ".default.weight")], value)
        for name, value in expected.items()
    )


def test_a_resumed_run_still_knows_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, tmp_path, (1.0, 3.0), save_total_limit=1).train()
    assert names(tmp_path / "run") == ["checkpoint-2"]  # a run that is done keeps the one that it published
    monkeypatch.undo()
    first = told(monkeypatch, tmp_path, (1.0, 3.0, 3.0, 3.0), save_total_limit=2, max_steps=8)
    first.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert first.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-8"]


def test_a_run_that_is_ended_before_its_end_keeps_the_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                control.should_save = control.should_training_stop = True

    trainer = told(monkeypatch, tmp_path, (1.0, 3.0, 3.0, 3.0), save_total_limit=1)
    trainer.add_callback(Stop())
    trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-5"]
    assert trainer.args.save_total_limit == 1


def test_a_best_checkpoint_that_could_not_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = told(monkeypatch, tmp_path, (2.0, 1.0, 3.0))

    def full(path: Path) -> None:
        if trainer.state.global_step == 4:
            raise OSError(28, os.strerror(28))
        sync(path)

    monkeypatch.setattr(checkpoints, "sync", full)
    trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("schedule", [None, "adalora:8:4:0.1:0.5"])
def test_every_file_of_a_checkpoint_has_the_mode_that_umask_gives(
    tmp_path: Path, mask: int, mode: int, schedule: str | None
) -> None:
    before = os.umask(mask)
    try:
        trainer = make_trainer(
            tiny_base(tmp_path),
            tmp_path / "run",
            items(40),
            rank_schedule=schedule,
            save_strategy="steps",
            save_steps=10,
            max_steps=10,
        )
        trainer.train()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run" / "checkpoint-10").iterdir() if path.is_file()]
    assert len(files) > 5
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == dict.fromkeys(
        (path.name for path in files), oct(mode)
    )


def test_what_the_loop_has_found_out_goes_through_a_checkpoint(tmp_path: Path) -> None:
    before, after = (make_trainer(tiny_base(tmp_path), tmp_path / "run", items(4)) for _ in range(2))
    before.micro_rows, before.eval_rows = 3, 2
    before.masked.count, before.masked.drawn = 2, 9
    after.take_own_state(json.loads(json.dumps(before.own_state())))
    assert (after.micro_rows, after.eval_rows) == (3, 2)
    assert (after.masked.count, after.masked.drawn) == (2, 9)
