"""The one base in memory, and a pass over it for the rows of all tasks at once."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.training.bases.load import Base
from manylora.training.tasks.attention import NAME, register_attention
from manylora.training.tasks.batch import MixedBatch
from manylora.training.tasks.lora import mix_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments


class MixedBase:
    """A base with the adapters of several tasks, in the order of ``models``, which are skeletons of it."""

    def __init__(self, base: Base, models: Sequence["PeftModel"], args: "TrainingArguments") -> None:
        register_attention()
        base.model.set_attn_implementation(NAME)
        if args.activation_checkpointing:
            base.model.activation_checkpointing_enable({"use_reentrant": False})
        self._model = base.model
        self._mixture = mix_adapters(base.model, models)
        self._autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.device: torch.device = base.model.device

    def backward(
        self, batch: MixedBatch, weights: Sequence[float], seeds: Sequence[int], smoothing: Sequence[float]
    ) -> Tensor:
        """Run forward and backward on Σ weight · (the task's summed loss). Returns those sums, float32 [tasks].

        ``seeds`` are of each task's dropout; ``smoothing`` is of its labels.
        """
        self._model.train()
        with self._mixture.of(batch.spans, seeds):
            sums = self._summed_losses(batch, smoothing)
            total = torch.stack([loss * weight for loss, weight in zip(sums, weights, strict=True)]).sum()
            torch.autograd.backward(total)
        return torch.stack(sums).detach()

    @torch.no_grad()
    def evaluate(self, batch: MixedBatch) -> Tensor:
        """Return each task's summed loss, float32 [tasks], without dropout and smoothing."""
        self._model.eval()
        with self._mixture.of(batch.spans):
            return torch.stack(self._summed_losses(batch, [0.0] * len(batch.spans)))

    def _summed_losses(self, batch: MixedBatch, smoothing: Sequence[float]) -> list[Tensor]:
        batch = batch.to(self.device)
        with self._precision():
            logits: Tensor = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.predicting,
                grids=batch.grids,
            ).logits[0]
            return [
                F.cross_entropy(
                    logits[start:end].float(),
                    batch.targets[start:end],
                    reduction="sum",
                    label_smoothing=smooth,
                )
                for (start, end), smooth in zip(batch.trained_spans, smoothing, strict=True)
            ]

    def _precision(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)
