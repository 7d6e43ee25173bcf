"""A training loop of a dozen lines around a rank policy, on a random model small enough for a test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2Config, Qwen2ForCausalLM, get_scheduler

from manylora.training.rank.policy import Moment, RankPolicy

VOCABULARY = 97
TARGETS = ["q_proj", "v_proj", "down_proj"]


def small_base() -> Qwen2ForCausalLM:
    """Return the same random base each time, in float32, frozen."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).requires_grad_(False)


def small_adapter(rank: int, **settings: Any) -> PeftModel:
    """Return ``small_base`` with a LoRA adapter on it."""
    base = small_base()
    torch.manual_seed(1)
    lora = {"r": rank, "lora_alpha": 16, "target_modules": TARGETS, "lora_dropout": 0.05, **settings}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))


def batch(step: int) -> Tensor:
    """Return tokens [4, 12] of a step: sequences that a model can learn."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(VOCABULARY, (4, 1), generator=generator)
    return (first + 3 * torch.arange(12)) % VOCABULARY


def logits(model: Any) -> Tensor:
    """Return the logits of a fixed batch, without dropout."""
    model.eval()
    with torch.no_grad():
        values: Tensor = model(input_ids=batch(10_000)).logits
    model.train()
    return values


@dataclass
class Run:
    """A model in training: the loop's calls to the policy in the loop's order."""

    model: PeftModel
    policy: RankPolicy
    total_steps: int
    optimizer: AdamW
    scheduler: LambdaLR
    step: int = 0

    @classmethod
    def start(
        cls, model: PeftModel, policy: RankPolicy, total_steps: int, *, checkpoint: Path | None = None
    ) -> "Run":
        """Begin a run, or go on from what ``save`` wrote."""
        policy.prepare(model)
        if checkpoint is not None:
            policy.restore(model, checkpoint)
        optimizer = AdamW(policy.optimizer_groups(two_groups(model)), lr=1e-3)
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=total_steps)
        policy.scheduler(scheduler)
        run = cls(model, policy, total_steps, optimizer, scheduler)
        model.train()
        torch.manual_seed(2)
        if checkpoint is not None:
            state = torch.load(checkpoint / "loop.pt", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            torch.set_rng_state(state["rng"])
            run.step = state["step"]
        return run

    def train(self, until: int) -> list[float]:
        """Take optimiser steps, two micro-batches each; return the mean losses."""
        losses = []
        while self.step < until:
            self.policy.before_step(self.model, self._moment())
            total = 0.0
            for part in batch(self.step).chunk(2):
                loss = token_loss(self.model, part) / 2
                penalty = self.policy.penalty(self.model)
                torch.autograd.backward(loss if penalty is None else loss + penalty / 2)
                total += loss.item()
            torch.nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), 1.0)
            self.optimizer.step()
            self.policy.after_backward(self.model, self._moment())
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(total)
        return losses

    def save(self, directory: Path) -> None:
        """Write a checkpoint, as the trainer would."""
        directory.mkdir(exist_ok=True)
        self.policy.save(self.model, directory, resumable=True)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
        }
        torch.save(state, directory / "loop.pt")

    def _moment(self) -> Moment:
        return Moment(self.step, self.total_steps, self.optimizer, self.scheduler)


def token_loss(model: PeftModel, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens, computed outside the model as the trainer does."""
    scores: Tensor = model(input_ids=tokens).logits[:, :-1]
    return cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


def two_groups(model: PeftModel) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups that differ, as LoRA+ has them."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if "lora_B" not in name], "weight_decay": 0.01},
        {"params": [p for name, p in trained if "lora_B" in name], "weight_decay": 0.1, "lr": 4e-3},
    ]
