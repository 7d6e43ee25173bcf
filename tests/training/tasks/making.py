"""Small runs of several tasks: a tiny random base, random examples, an adapter of each task on a skeleton."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.training.bases.load import Base
from manylora.training.bases.lora import attach
from manylora.training.job import total_steps
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import lora_settings
from manylora.training.rank.make import make_policy
from manylora.training.tasks.member import Member
from manylora.training.tasks.mixed_base import MixedBase
from manylora.training.tasks.plan import Task
from manylora.training.tasks.side_by_side import SideBySide
from manylora.training.tasks.skeleton import skeleton
from tests.training.loop.making import Item

COMMON: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "save_strategy": "no",
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Spec:
    """A task: its rows, and flags that differ from COMMON."""

    rows: Sequence[Item]
    flags: dict[str, Any]
    eval_rows: Sequence[Item] = ()


class Silent:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, float]]] = []

    def logged(self, run: SideBySide, member: Member, values: dict[str, float]) -> None:
        self.told.append((member.name, values))

    def round_done(self, run: SideBySide) -> None:
        pass


def task(name: str, output: Path, **flags: Any) -> Task:
    """A task with COMMON's flags and its own."""
    words = ["--use_lora", "--data_path", "unused.jsonl", "--output_dir", str(output / name)]
    words += ["--eval_data_path", "unused.jsonl"]
    for key, value in {**COMMON, **flags}.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return Task(name, parse_arguments(words))


def member(base: Base, output: Path, name: str, spec: Spec) -> Member:
    """A task's member, its adapter drawn from its seed."""
    made = task(name, output, **spec.flags)
    lora, args = made.arguments.lora, made.arguments.training
    policy = make_policy(lora.rank_schedule, lora.lora_r, seed=args.seed)
    settings = replace(lora_settings(made.arguments), r=policy.initial_rank)
    own = replace(base, model=skeleton(base.model))
    torch.manual_seed(args.seed)
    model = policy.attach(own, settings, total_steps(args, len(spec.rows))) or attach(own, settings)
    return Member(made, model, policy, list(spec.rows), list(spec.eval_rows))


def team(
    base: Base,
    output: Path,
    specs: Sequence[Spec],
    *,
    start: bool = True,
    observer: Silent | None = None,
    **flags: Any,
) -> SideBySide:
    """All tasks side by side on ``base``, which is theirs from now on. Without ``start``, optimisers are missing."""
    members = [
        member(base, output, f"task{at}", replace(spec, flags={**flags, **spec.flags}))
        for at, spec in enumerate(specs)
    ]
    if start:
        for each in members:
            each.make_optimizer()
    mixed = MixedBase(base, [each.model for each in members], members[0].args)
    return SideBySide(mixed, members, observer or Silent())


def trained(each: Member) -> dict[str, Tensor]:
    """Copies of what a task trains, by name."""
    return {
        name: value.detach().clone() for name, value in each.model.named_parameters() if value.requires_grad
    }


def losses(each: Member) -> list[float]:
    """The logged loss of every step."""
    return [entry["loss"] for entry in each.state.log_history if "loss" in entry]
