"""Runs under the guard: what is healthy is let alone, what falls apart goes back with all of its state."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manylora.adapters.tokenizer import load_tokenizer
from manylora.demo.task_data import conversations
from manylora.training.bases.load import BaseSettings, load_base
from manylora.training.errors import Diverged
from manylora.training.loop import checkpoints
from manylora.training.loop.trainer import LoopSettings, LoraTrainer
from tests.training.loop.making import Item, items, losses, make_trainer, tiny_base, weights

DEMO = Path(__file__).resolve().parents[3] / "demo" / "base"


def known(count: int) -> list[Item]:
    """Return equal rows, which a run knows after some steps."""
    return items(1, seed=9) * count


def kinds(trainer: LoraTrainer) -> list[str]:
    return [event.kind for event in trainer.events.all]


class Steps(TrainerCallback):
    """Calls back after every step with the number of steps taken."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.call(state.global_step)


def test_rows_of_two_kinds_one_after_the_other_are_a_healthy_run(tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_base(tmp_path),
        tmp_path / "run",
        [*known(40), *items(40, seed=3)],
        max_steps=70,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    found = losses(trainer)
    assert min(found[25:40]) < 1.0 < 4.0 < max(found[40:45])
    assert kinds(trainer) == []


@pytest.mark.parametrize(("rate", "warmup"), [(3.0, 0), (0.03, 40)], ids=["at once", "after the warm-up"])
def test_a_rate_that_is_far_too_high_is_caught(tmp_path: Path, rate: float, warmup: int) -> None:
    options: dict[str, Any] = {"max_steps": 50, "learning_rate": rate, "warmup_steps": warmup}
    alone = make_trainer(
        tiny_base(tmp_path), tmp_path / "off", items(40), settings=LoopSettings(guard="off"), **options
    )
    alone.train()
    norms = [entry["grad_norm"] for entry in alone.state.log_history if "grad_norm" in entry]
    assert math.isnan(norms[-1]) or losses(alone)[-1] > min(losses(alone)) + 1
    assert kinds(alone) == []
    trainer = make_trainer(
        tiny_base(tmp_path), tmp_path / "run", items(40), settings=LoopSettings("stop"), **options
    )
    with pytest.raises(Diverged, match="learning rate"):
        trainer.train()


def test_warn_says_it_and_the_run_goes_on(tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_base(tmp_path),
        tmp_path / "run",
        items(40),
        max_steps=50,
        learning_rate=0.03,
        warmup_steps=40,
        settings=LoopSettings(guard="warn"),
    )
    trainer.train()
    assert trainer.state.global_step == 50
    assert set(kinds(trainer)) == {"warning"}
    assert losses(trainer)[-1] > min(losses(trainer)) + 1


# --- steps back


class Shaken(LoraTrainer):
    """A trainer that loses its weights, and gets gradients to match, after its twelfth step, so often."""

    times = 1

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        if self.state.global_step >= 12 and self.times:
            self.times -= 1
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=30.0)
        return super().training_step(*args, **named)


def optimizer_state(trainer: LoraTrainer) -> list[Tensor]:
    states = trainer.moment().optimizer.state_dict()["state"]
    return [value.clone() for _, state in sorted(states.items()) for _, value in sorted(state.items())]


def test_a_step_back_brings_weights_and_the_optimisers_state_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Shaken)
    trainer = make_trainer(
        tiny_base(tmp_path), tmp_path / "run", items(40), max_steps=30, lr_scheduler_type="constant"
    )
    seen: dict[int, tuple[dict[str, Tensor], list[Tensor]]] = {}
    trainer.add_callback(
        Steps(lambda step: seen.update({step: (weights(trainer), optimizer_state(trainer))}))
    )
    trainer.train()
    [event] = trainer.events.all
    assert event.kind == "backoff"
    good = int(event.sentence.split("Back to the state of step ")[1].split(",")[0])
    assert 0 < good <= 12
    # The step on which it went back took none.
    after_weights, after_state = seen[event.step + 1]
    good_weights, good_state = seen[good]
    assert all(torch.equal(after_weights[name], value) for name, value in good_weights.items())
    assert len(after_state) == len(good_state) > 0
    assert all(torch.equal(one, other) for one, other in zip(after_state, good_state, strict=True))
    assert not all(
        torch.equal(one, other) for one, other in zip(seen[event.step][1], good_state, strict=True)
    )
    assert losses(trainer)[-1] < losses(trainer)[0] + 0.5


def test_a_resumed_run_remembers_its_steps_back_and_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Shaken)
    options: dict[str, Any] = {
        "max_steps": 100,
        "learning_rate": 1e-9,  # flat: said once
        "save_strategy": "steps",
        "save_steps": 60,
    }
    first = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), **options)
    first.add_callback(Steps(lambda step: setattr(first.control, "should_training_stop", step == 60)))
    first.train()
    assert kinds(first) == ["backoff"]
    monkeypatch.setattr(Shaken, "times", 3)
    resumed = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), **options)
    last = str(checkpoints.last_checkpoint(tmp_path / "run"))
    with pytest.raises(Diverged, match="after 3 steps back"):
        resumed.train(resume_from_checkpoint=last)


class Faded(LoraTrainer):
    """A trainer that loses most of what it has learnt after its twentieth step."""

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        if self.state.global_step == 20:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(0.1)
        return super().training_step(*args, **named)


def test_a_checkpoint_of_weights_that_fell_apart_holds_the_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 21}
    monkeypatch.setattr("tests.training.loop.making.LoraTrainer", Faded)
    first = make_trainer(tiny_base(tmp_path), tmp_path / "run", known(40), max_steps=21, **options)
    first.train()
    learnt, faded = losses(first)[-2:]
    assert learnt < 1.0 < learnt + 2 < faded < losses(first)[0] - 0.5, "better than the base, and astray"
    assert kinds(first) == ["backoff"]
    assert "the checkpoint of step 21" in first.events.all[0].sentence
    monkeypatch.undo()
    resumed = make_trainer(tiny_base(tmp_path), tmp_path / "run", known(40), max_steps=24, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-21"))
    assert losses(resumed)[21] < learnt + 0.5
    assert kinds(resumed) == []


def known_to_the_demo(count: int) -> list[Item]:
    """Return conversations that the demo's base answers rightly."""
    tokenizer: Any = load_tokenizer(DEMO)
    found = []
    for row in conversations("plain", count, seed=0):
        question, answer = (turn["value"] for turn in row["conversations"])  # type: ignore[attr-defined]  # a list
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt, ids = (tokenizer(each, add_special_tokens=False).input_ids for each in (text, answer))
        found.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids})
    return found


def test_a_run_that_was_astray_when_its_checkpoint_was_written_is_caught_by_the_one_that_goes_on(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"learning_rate": 0.3, "save_strategy": "steps", "save_steps": 4}
    rows = known_to_the_demo(8)

    def begun(steps: int, guard: str) -> LoraTrainer:
        base = load_base(BaseSettings(str(DEMO), dtype="fp32"))
        settings = LoopSettings(guard=guard)
        return make_trainer(base, tmp_path / "run", rows, max_steps=steps, settings=settings, **options)

    begun(4, "off").train()  # else none would have been written
    with pytest.raises(Diverged, match="with the base alone"):
        begun(30, "on").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_resumed_run_says_what_was_said_no_second_time(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 130,
        "learning_rate": 1e-9,
        "save_strategy": "steps",
        "save_steps": 60,
        "per_device_train_batch_size": 1,
    }
    whole = make_trainer(tiny_base(tmp_path), tmp_path / "run", known(8), **options)
    whole.train()
    assert [(event.kind, event.step) for event in whole.events.all] == [("flat", 49)]
    first = tmp_path / "run" / "checkpoint-60"
    resumed = make_trainer(tiny_base(tmp_path), tmp_path / "run", known(8), **options)
    resumed.train(resume_from_checkpoint=str(first))
    assert kinds(resumed) == []
    assert resumed.watch.guard.state() == whole.watch.guard.state()


# --- fp16


class TooLargeAtFirst(torch.amp.GradScaler):
    """A scaler whose scale makes the first three steps' gradients, and the tenth's, overflow."""

    steps = 0

    def scale(self, outputs: Any) -> Any:
        self.steps += 1
        return super().scale(outputs) * (math.inf if self.steps in (1, 2, 3, 10) else 1.0)


def scale_loss(trainer: LoraTrainer) -> None:
    """Train as accelerate does in fp16, on a CPU."""
    accelerator = trainer.accelerator
    accelerator.scaler = TooLargeAtFirst("cpu")

    def unscale(_: object = None) -> None:
        accelerator.scaler.unscale_(trainer.moment().optimizer)

    accelerator.unscale_gradients = unscale


@pytest.mark.parametrize("rank_schedule", [None, "adalora:8:4"])
def test_a_loss_scale_that_is_being_found_is_no_trouble(tmp_path: Path, rank_schedule: str | None) -> None:
    trainer = make_trainer(
        tiny_base(tmp_path),
        tmp_path / "run",
        items(40),
        max_steps=20,
        rank_schedule=rank_schedule,
        lr_scheduler_type="constant",
    )
    scale_loss(trainer)
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [step for step, norm in enumerate(norms) if not math.isfinite(norm)] == [0, 1, 2, 9]
    assert kinds(trainer) == []
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert rates == {1e-3}
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())
    ratings = getattr(getattr(trainer.model.base_model, "rankallocator", None), "ipt", {})
    assert all(bool(torch.isfinite(value).all()) for value in ratings.values())


@pytest.mark.parametrize("norm", [float("inf"), -1.0])
def test_so_it_is_with_deepspeed_which_reports_the_norm_itself(tmp_path: Path, norm: float) -> None:
    trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), max_steps=8)
    trainer.args.fp16 = True
    clip = trainer._clip_grad_norm

    def reported(model: Any) -> Any:
        return torch.tensor(norm) if trainer.state.global_step in (2, 3, 6) else clip(model)

    trainer._clip_grad_norm = reported
    trainer.add_callback(Steps(lambda _: setattr(trainer, "is_deepspeed_enabled", True)))
    trainer.train()
    assert kinds(trainer) == []


# --- rows without a trained token


def untrained(count: int) -> list[Item]:
    return [{**item, "labels": [-100] * len(item["labels"])} for item in items(count, seed=7)]


def test_a_window_of_rows_without_a_trained_token_costs_nothing_and_moves_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_base(tmp_path),
        tmp_path / "run",
        [*items(2), *untrained(2), *items(2, seed=1)],
        max_steps=6,
        per_device_train_batch_size=1,
        weight_decay=0.1,
        train_sampling_strategy="sequential",
        logging_nan_inf_filter=False,  # which would log 0 for what is no number
    )
    seen: list[dict[str, Tensor]] = []
    trainer.add_callback(Steps(lambda _: seen.append(weights(trainer))))
    trainer.train()
    assert losses(trainer)[2:4] == [0.0, 0.0]
    assert min(losses(trainer)[:2] + losses(trainer)[4:]) > 1
    assert all(torch.equal(seen[1][name], value) for name, value in seen[3].items())
    assert not all(torch.equal(seen[3][name], value) for name, value in seen[4].items())
    said = [event.sentence for event in trainer.events.all]
    assert [event.kind for event in trainer.events.all] == ["note", "note"]
    assert "--model_max_length" in said[0]
    assert said[1].startswith("2 of the 6 rows")


def test_beside_others_such_rows_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    found = []
    for name, data in (("with", [*items(3), *untrained(1)]), ("without", items(3))):
        trainer = make_trainer(
            tiny_base(tmp_path), tmp_path / name, data, max_steps=3, per_device_train_batch_size=len(data)
        )
        trainer.train()
        found.append((losses(trainer), weights(trainer)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-3, atol=2e-5)


def test_held_out_rows_without_a_trained_token_are_no_perfect_score(tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(4), eval_data=untrained(3))
    metrics: Mapping[str, float] = trainer.evaluate()
    assert metrics["eval_loss"] != metrics["eval_loss"]
    assert metrics["eval_tokens"] == 0


def test_the_rows_that_are_asked_again_are_the_last_ones_of_a_window_of_many_micro_batches(
    tmp_path: Path,
) -> None:
    data = items(24, seed=4)
    trainer = make_trainer(
        tiny_base(tmp_path),
        tmp_path / "run",
        data,
        eval_data=data[16:],
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=12,
        learning_rate=1e-2,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert trainer.recent_losses() == pytest.approx(trainer.held_out_losses(), abs=1e-5)
    assert len(trainer.recent_losses()) == 8
