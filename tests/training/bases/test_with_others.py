"""Bases and adapters under what a run adds: NEFTune, gradient checkpointing, a growing rank, DDP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch has it without saying so
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from manylora.training.bases.lora import LoraSettings, attach, lora_parameter_groups
from manylora.training.bases.quantized import QuantizedLinear
from manylora.training.rank.growing import GrowingRank
from manylora.training.rank.policy import Moment
from manylora.training.rank.schedule import RankSchedule
from tests.training.bases.making import IDS, load
from tests.training.bases.serving import served_logits


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", ["dense", "nf4", "gptq"])
def test_neftune_with_gradient_checkpointing(kind: str, directories: dict[str, Path], tmp_path: Path) -> None:
    base = load(directories[kind], q_lora=kind == "nf4")
    model = attach(base, LoraSettings(r=4, dropout=0.0))
    before = logits(model)
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def train(alpha: float | None) -> float:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            neftune_noise_alpha=alpha,
            activation_checkpointing=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            learning_rate=0.0,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=base.tokenizer)
        return float(trainer.train().training_loss)

    quiet, noisy = train(None), train(50.0)
    assert abs(noisy - quiet) > 0.01
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_rank_that_grows_from_such_a_start(init: str, directories: dict[str, Path], tmp_path: Path) -> None:
    base = load(directories["nf4"], q_lora=True)
    policy = GrowingRank(RankSchedule.parse("4:0,8:0.5"), seed=0)
    model = attach(base, LoraSettings(r=policy.initial_rank, init=init, dropout=0.0))
    policy.prepare(model)
    groups = policy.optimizer_groups(lora_parameter_groups(model, 1e-2, 0.0))
    optimizer = AdamW(groups)
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    for step in range(4):
        policy.before_step(model, Moment(step, 4, optimizer, scheduler))
        torch.autograd.backward(model.train()(input_ids=IDS, labels=IDS).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert policy.rank == 8
    policy.save(model, tmp_path, resumable=True)
    torch.testing.assert_close(
        served_logits(base, tmp_path, IDS[0].tolist()), logits(model)[0], rtol=0, atol=1e-4
    )
    other = GrowingRank(policy.schedule, seed=0)
    resumed = attach(load(directories["nf4"], q_lora=True), LoraSettings(r=4, init=init, dropout=0.0))
    other.prepare(resumed)
    other.restore(resumed, tmp_path)
    assert torch.equal(logits(resumed), logits(model))


def test_ddp_leaves_packed_weights_where_they_are(directories: dict[str, Path]) -> None:
    """As parameters without gradient they are neither reduced nor sent around before each step, as buffers would be."""
    model = attach(load(directories["gptq"]), LoraSettings(r=4))
    assert any(isinstance(each, QuantizedLinear) for each in model.modules())
    large = [name for name, each in model.named_buffers() if each.numel() > 1000]
    assert not large
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        wrapped: nn.Module = DistributedDataParallel(model)
        torch.autograd.backward(wrapped(input_ids=IDS, labels=IDS).loss)
    finally:
        torch.distributed.destroy_process_group()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
