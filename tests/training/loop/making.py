"""Small runs for tests: a tiny random base, random examples, a trainer over them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.arguments import TrainingArguments
from manylora.training.bases.load import Base, BaseSettings, load_base
from manylora.training.bases.lora import LoraSettings, attach
from manylora.training.data.collate import Collator
from manylora.training.loop.trainer import LoopSettings, LoraTrainer
from manylora.training.rank.make import make_policy

Item = dict[str, list[int]]


def items(count: int, seed: int = 0, longest: int = 24) -> list[Item]:
    """Return examples of random tokens, each with a prompt that isn't trained and an answer that is."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, longest, (1,), generator=random))
        prompt = int(torch.randint(2, length - 2, (1,), generator=random))
        ids = torch.randint(3, 300, (length,), generator=random).tolist()
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def tiny_base(directory: Path, *, q_lora: bool = False) -> Base:
    """Write and load the tiny base in float32."""
    path = directory / "base"
    if not path.exists():
        write_base(path, TINY)
    return load_base(BaseSettings(str(path), q_lora=q_lora, dtype="fp32"))


def make_trainer(
    base: Base,
    output: Path,
    data: Sequence[Item],
    *,
    rank_schedule: str | None = None,
    dropout: float = 0.0,
    eval_data: Sequence[Item] | None = None,
    settings: LoopSettings | None = None,
    **arguments: Any,
) -> LoraTrainer:
    """Return a trainer that is ready to train. Equal arguments give equal adapters at the start."""
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    args = TrainingArguments(str(output), use_cpu=True, **{**options, **arguments})
    torch.manual_seed(args.seed)
    policy = make_policy(rank_schedule, 8)
    lora = LoraSettings(r=policy.initial_rank, alpha=16, dropout=dropout)
    model = policy.attach(base, lora, args.max_steps) or attach(base, lora)
    return LoraTrainer(
        model,
        args,
        policy,
        settings,
        train_dataset=list(data),
        eval_dataset=None if eval_data is None else list(eval_data),
        data_collator=Collator(0),
    )


def losses(trainer: LoraTrainer) -> list[float]:
    """Return the logged loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: LoraTrainer) -> dict[str, torch.Tensor]:
    """Return copies of what was trained."""
    return {
        name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad
    }


def collated(data: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Return the examples as one padded batch."""
    return {name: value for name, value in Collator(0)(data).items() if isinstance(value, torch.Tensor)}
