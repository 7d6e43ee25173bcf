"""Tasks side by side: each comes out as alone, whatever the others do; resumed runs equal unbroken ones."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.training.bases.load import Base
from manylora.training.bases.lora import attach
from manylora.training.data.collate import Collator
from manylora.training.errors import DoesNotFit
from manylora.training.job import total_steps
from manylora.training.loop.trainer import LoopSettings, LoraTrainer
from manylora.training.preparation import lora_settings
from manylora.training.rank.make import make_policy
from manylora.training.tasks.batch import MixedBatch
from manylora.training.tasks.mixed_base import MixedBase, PassLosses
from manylora.training.tasks.saving import RunFiles
from manylora.training.tasks.side_by_side import SideBySide
from manylora.training.tasks.skeleton import skeleton
from tests.training.loop.making import Item, items, tiny_base
from tests.training.tasks.making import Silent, Spec, losses, task, team, trained

SPECS = (
    Spec(items(20, seed=1), {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "seed": 3}),
    Spec(
        items(9, seed=2),
        {
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "lr_scheduler_type": "cosine",
            "label_smoothing_factor": 0.2,
        },
    ),
    Spec(
        items(30, seed=3, longest=60), {"use_rslora": True, "weight_decay": 0.1, "warmup_steps": 2, "seed": 5}
    ),
    Spec(
        items(12, seed=4),
        {"rank_schedule": "4:0,8:0.5", "loraplus_lr_ratio": 4.0},
    ),
)


def alone(base: Base, spec: Spec, output: Path) -> LoraTrainer:
    """Train the same task by itself, with LoraTrainer and peft's own forward."""
    arguments = task("alone", output, **spec.flags).arguments
    policy = make_policy(arguments.lora.rank_schedule, arguments.lora.lora_r, seed=arguments.training.seed)
    lora = replace(lora_settings(arguments), r=policy.initial_rank)
    own = replace(base, model=skeleton(base.model))
    torch.manual_seed(arguments.training.seed)
    model = policy.attach(own, lora, total_steps(arguments.training, len(spec.rows))) or attach(own, lora)
    trainer = LoraTrainer(
        model,
        arguments.training,
        policy,
        LoopSettings(loraplus_lr_ratio=arguments.lora.loraplus_lr_ratio),
        train_dataset=list(spec.rows),
        data_collator=Collator(0),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("q_lora", [False, True], ids=["dense", "nf4"])
def test_each_task_comes_out_as_it_does_alone(tmp_path: Path, q_lora: bool) -> None:
    base = tiny_base(tmp_path, q_lora=q_lora)
    reference = tiny_base(tmp_path, q_lora=q_lora)
    singles = [alone(reference, spec, tmp_path / "alone") for spec in SPECS]
    run = team(base, tmp_path, SPECS)
    run.run()
    for single, each in zip(singles, run.members, strict=True):
        expected = {name: value for name, value in single.model.named_parameters() if value.requires_grad}
        found = trained(each)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-4)
        alone_losses = [entry["loss"] for entry in single.state.log_history if "loss" in entry]
        assert losses(each) == pytest.approx(alone_losses, rel=1e-4)
        assert each.train_loss == pytest.approx(statistics.fmean(alone_losses), rel=1e-4)


def test_the_held_out_loss_of_a_task_is_the_mean_over_its_own_tokens(tmp_path: Path) -> None:
    held_out = [items(7, seed=9), items(2, seed=8, longest=60)]
    specs = [replace(spec, eval_rows=rows) for spec, rows in zip(SPECS, held_out, strict=False)]
    run = team(tiny_base(tmp_path), tmp_path, specs)
    run.evaluate(run.members)
    for member, rows in zip(run.members, held_out, strict=True):
        counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
        total = sum(loss * count for loss, count in zip(member.losses_of(rows), counts, strict=True))
        [found] = member.state.log_history
        assert found["eval_tokens"] == sum(counts)
        assert found["eval_loss"] == pytest.approx(total / sum(counts), rel=1e-5)


def test_a_task_does_not_depend_on_the_others_dropout_and_checkpointing_included(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"lora_dropout": 0.2, "gradient_checkpointing": True}
    first = team(tiny_base(tmp_path), tmp_path, SPECS[:1], **flags)
    first.run()
    both = team(tiny_base(tmp_path), tmp_path, [SPECS[0], SPECS[2]], **flags)
    both.run()
    plain = team(tiny_base(tmp_path), tmp_path, SPECS[:1], lora_dropout=0.2)
    plain.run()
    for name, value in trained(first.members[0]).items():
        torch.testing.assert_close(trained(both.members[0])[name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(trained(plain.members[0])[name], value, atol=1e-5, rtol=1e-4)
    without = team(tiny_base(tmp_path), tmp_path, SPECS[:1])
    without.run()
    assert losses(without.members[0]) != losses(first.members[0])


def test_packed_rows_are_trained_as_the_documents_in_them(tmp_path: Path) -> None:
    rows = items(8, seed=6)
    packed = [
        {
            "input_ids": [*one["input_ids"], *two["input_ids"]],
            "labels": [*one["labels"], *two["labels"]],
            "position_ids": [*range(len(one["input_ids"])), *range(len(two["input_ids"]))],
        }
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    ]
    flags: dict[str, Any] = {"train_sampling_strategy": "sequential", "max_steps": 2}
    apart = team(tiny_base(tmp_path), tmp_path, [Spec(rows, {**flags, "per_device_train_batch_size": 4})])
    together = team(
        tiny_base(tmp_path), tmp_path, [Spec(packed, {**flags, "per_device_train_batch_size": 2})]
    )
    apart.run()
    together.run()
    assert losses(together.members[0]) == pytest.approx(losses(apart.members[0]), rel=1e-5)


def test_a_task_that_diverges_is_stopped_and_the_others_go_on(tmp_path: Path) -> None:
    run = team(tiny_base(tmp_path), tmp_path, SPECS[:2], on_divergence="stop")
    expected = team(tiny_base(tmp_path), tmp_path, SPECS[1:2])
    expected.run()
    with torch.no_grad():
        next(iter(run.members[0].parameters)).fill_(float("nan"))
    run.run()
    assert "stopped at step 1" in run.members[0].stopped
    assert run.members[1].step == 4
    for name, value in trained(run.members[1]).items():
        torch.testing.assert_close(value, trained(expected.members[0])[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, at: int) -> None:
    flags: dict[str, Any] = {"lora_dropout": 0.1, "logging_steps": 2}
    whole = team(tiny_base(tmp_path), tmp_path, SPECS, **flags)
    files = _files(tmp_path, at)
    for _ in range(at):
        whole._round()
    files.round_done(whole)
    generator = torch.get_rng_state()
    whole.run()
    resumed = team(tiny_base(tmp_path), tmp_path, SPECS, start=False, **flags)
    torch.manual_seed(999)
    _files(tmp_path, at).resume(resumed)
    assert resumed.rounds == at
    assert torch.equal(torch.get_rng_state(), generator), "for a base with dropout of its own"
    resumed.run()
    for one, other in zip(whole.members, resumed.members, strict=True):
        assert losses(one) == losses(other)
        assert one.watch.state() == other.watch.state()
        assert one.watch.guard.seen == one.total_steps
        expected = trained(one)
        for name, value in trained(other).items():
            assert torch.equal(value, expected[name]), name


def _files(directory: Path, every: int) -> RunFiles:
    args = task("", directory, save_strategy="steps", save_steps=every).training
    return RunFiles(args, tiny_base(directory).tokenizer, lambda sentence: None)


class _Cramped(MixedBase):
    """A base on a machine where more than three rows at once don't fit."""

    most = 3

    def _losses(self, batch: MixedBatch, smoothing: Sequence[float]) -> PassLosses:
        losses = super()._losses(batch, smoothing)
        if sum(grid.documents for grid in batch.grids) > self.most:
            torch.autograd.backward(losses.sums.sum(), retain_graph=True)  # part is done when memory runs out
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses


def _cramped(base: Base, directory: Path) -> SideBySide:
    run = team(base, directory, SPECS[:2])
    members = run.members
    for module in base.model.modules():
        module._forward_hooks.clear()
    run.base = _Cramped(base, [each.model for each in members], members[0].args)
    return run


def test_running_out_of_memory_splits_the_batch_and_changes_nothing_else(tmp_path: Path) -> None:
    whole = team(tiny_base(tmp_path), tmp_path, SPECS[:2])
    whole.run()
    cramped = _cramped(tiny_base(tmp_path), tmp_path)
    said: list[str] = []
    cramped.members[0].events.listeners.append(lambda event: said.append(event.sentence))
    cramped.run()
    assert cramped.pieces == 4
    assert "split in 4" in said[-1]
    for one, other in zip(whole.members, cramped.members, strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)


def test_one_row_that_does_not_fit_ends_the_run_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Cramped, "most", 0)
    with pytest.raises(DoesNotFit, match="gradient_checkpointing"):
        _cramped(tiny_base(tmp_path), tmp_path).run()


class _CrampedJudge(MixedBase):
    """A base on a machine where training fits and evaluating more than so many rows at once doesn't."""

    most = 2

    def evaluate(self, batch: MixedBatch) -> PassLosses:
        if sum(grid.documents for grid in batch.grids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().evaluate(batch)


@pytest.mark.parametrize("most", [2, 0])
def test_an_evaluation_out_of_memory_is_split_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    specs = [replace(spec, eval_rows=items(5, seed=9)) for spec in SPECS[:2]]
    whole = team(tiny_base(tmp_path), tmp_path, specs)
    whole.evaluate(whole.members)
    base = tiny_base(tmp_path)
    cramped = team(base, tmp_path, specs)
    for module in base.model.modules():
        module._forward_hooks.clear()
    monkeypatch.setattr(_CrampedJudge, "most", most)
    cramped.base = _CrampedJudge(base, [each.model for each in cramped.members], cramped.members[0].args)
    if most == 0:
        with pytest.raises(DoesNotFit, match="evaluating one row"):
            cramped.evaluate(cramped.members)
        return
    cramped.evaluate(cramped.members)
    for one, other in zip(whole.members, cramped.members, strict=True):
        expected, found = one.state.log_history[-1], other.state.log_history[-1]
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert found["eval_tokens"] == expected["eval_tokens"]
    assert cramped.members[0].events.all[-1].kind == "split"


def test_held_out_rows_are_judged_when_due_and_at_the_end(tmp_path: Path) -> None:
    held_out = items(7, seed=9)
    observer = Silent()
    specs = [
        Spec(SPECS[0].rows, {**SPECS[0].flags, "eval_strategy": "steps", "eval_steps": 4}, held_out),
        SPECS[1],
    ]
    run = team(tiny_base(tmp_path), tmp_path, specs, observer=observer)
    run.run()
    entries = [entry for entry in run.members[0].state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [4, 6]
    assert entries[0]["eval_tokens"] == sum(label != -100 for row in held_out for label in row["labels"][1:])
    single = alone(tiny_base(tmp_path), SPECS[0], tmp_path / "alone")
    expected = single.evaluate(eval_dataset=held_out)["eval_loss"]
    assert entries[1]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert all("eval_loss" not in values for name, values in observer.told if name == "task1")


def _without_labels(rows: Sequence[Item]) -> list[Item]:
    return [{**row, "labels": [-100] * len(row["labels"])} for row in rows]


ONE_BY_ONE: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "train_sampling_strategy": "sequential",
}


def test_a_task_of_two_kinds_of_rows_is_let_alone_and_one_that_falls_apart_is_stopped(tmp_path: Path) -> None:
    known, new = items(1, seed=9) * 40, items(40, seed=3)
    flags = {**ONE_BY_ONE, "max_steps": 60, "on_divergence": "stop"}
    wild_flags = {"learning_rate": 0.03, "warmup_steps": 40, "per_device_train_batch_size": 4}
    run = team(
        tiny_base(tmp_path),
        tmp_path,
        [
            Spec([*known, *new], {**flags, "learning_rate": 1e-2}),
            Spec(new, {**flags, **wild_flags}),
            Spec(new, {**flags, **wild_flags, "guard": "off"}),
        ],
    )
    run.run()
    healthy, wild, unwatched = run.members
    assert max(losses(healthy)[40:45]) > min(losses(healthy)[25:40]) + 3
    assert healthy.events.all == []
    assert (healthy.stopped, healthy.step) == ("", 60)
    assert "learning rate" in wild.stopped
    assert losses(unwatched)[-1] > min(losses(unwatched)) + 1
    assert unwatched.events.all == []


def test_a_checkpoint_holds_no_task_that_fell_apart(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"max_steps": 24, "learning_rate": 1e-2}
    rows = items(1, seed=9) * 40
    run = team(tiny_base(tmp_path), tmp_path, [Spec(rows, flags), Spec(rows, {**flags, "guard": "off"})])
    for _ in range(20):
        run._round()
    with torch.no_grad():
        for each in run.members:
            for name, parameter in each.model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.1)
    faded = trained(run.members[1])
    _files(tmp_path, 20).round_done(run)
    again = team(tiny_base(tmp_path), tmp_path, [Spec(rows, flags), Spec(rows, flags)], start=False)
    _files(tmp_path, 20).resume(again)
    watched, unwatched = again.members
    assert [event.kind for event in run.members[0].events.all] == ["backoff"]
    assert run.members[1].events.all == []
    assert all(torch.equal(value, faded[name]) for name, value in trained(unwatched).items())
    learnt, lost = (statistics.fmean(each.losses_of(rows[:2])) for each in again.members)
    assert learnt < 1.0 < learnt + 2 < lost < losses(watched)[0] - 0.5, "better than the base, and astray"


def test_a_task_that_was_astray_in_its_checkpoint_is_stopped_when_the_run_goes_on(tmp_path: Path) -> None:
    # What has learnt one row by heart costs more on others than the base does.
    expert = team(
        tiny_base(tmp_path), tmp_path, [Spec(items(1, seed=9) * 40, {"learning_rate": 3e-2, "max_steps": 40})]
    )
    expert.run()
    specs = [Spec(items(40, seed=at), {"max_steps": 40, "learning_rate": 1e-9}) for at in (3, 4)]
    first = team(tiny_base(tmp_path), tmp_path, specs, guard="off")
    first._round()
    with torch.no_grad():
        for name, parameter in first.members[0].model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained(expert.members[0])[name])
    _files(tmp_path, 1).round_done(first)
    again = team(tiny_base(tmp_path), tmp_path, specs, start=False)
    _files(tmp_path, 1).resume(again)
    again.run()
    astray, healthy = again.members
    assert "with the base alone" in astray.stopped
    assert (healthy.stopped, healthy.step, healthy.events.all) == ("", 40, [])


def test_rows_without_a_trained_token_cost_a_task_nothing_and_move_nothing(tmp_path: Path) -> None:
    rows = [*items(2), *_without_labels(items(2, seed=7)), *items(2, seed=1)]
    run = team(
        tiny_base(tmp_path), tmp_path, [Spec(rows, ONE_BY_ONE), Spec(items(9, seed=2), {"max_steps": 2})]
    )
    seen = []
    for _ in range(6):
        run._round()
        seen.append(trained(run.members[0]))
    assert losses(run.members[0])[2:4] == [0.0, 0.0]
    assert all(torch.equal(seen[1][name], value) for name, value in seen[3].items())
    assert not all(torch.equal(seen[3][name], value) for name, value in seen[4].items())
    events = run.members[0].events.all
    assert [event.kind for event in events] == ["note", "note"]
    assert events[1].sentence.startswith("2 of the 6 rows")
    assert run.members[1].events.all == []


def test_every_step_and_micro_batch_draws_its_dropout_anew(tmp_path: Path) -> None:
    flags: dict[str, Any] = {**ONE_BY_ONE, "max_steps": 4, "learning_rate": 1e-30}
    specs = [Spec(items(1, longest=40), {**flags, "lora_dropout": dropout}) for dropout in (0.5, 0.0)]
    run = team(tiny_base(tmp_path), tmp_path, specs)
    for each in run.members:
        for parameter in each.parameters:
            torch.nn.init.normal_(parameter, std=0.2)
    run.run()
    # The same row and the same weights: what differs is what dropout left out.
    assert len(set(losses(run.members[0]))) == 4
    assert losses(run.members[1]) == pytest.approx([losses(run.members[1])[0]] * 4, rel=1e-6)
    assert len({run.members[0].dropout_seed(number) for number in range(8)}) == 8
