"""The one base in memory, and a pass over it for the rows of all tasks at once."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class PassLosses:
    """What a pass over a mixed batch gave."""

    tokens: tuple[Tensor, ...]
    """Each task's trained tokens' cross-entropies, float32, row by row."""
    row_tokens: tuple[tuple[int, ...], ...]
    """How many of them each of its rows has."""

    @property
    def sums(self) -> Tensor:
        """Each task's summed loss, float32 [tasks]."""
        return torch.stack([losses.sum() for losses in self.tokens])

    def rows(self, task: int) -> list[float]:
        """Return the loss per trained token of each of a task's rows; rows without a trained token are left out."""
        parts: tuple[Tensor, ...] = self.tokens[task].split_with_sizes(list(self.row_tokens[task]))
        means = [part.mean() for part in parts if len(part)]
        found: list[float] = torch.stack(means).tolist() if means else []
        return found


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
    ) -> PassLosses:
        """Run forward and backward on Σ weight · (the task's summed loss).

        ``seeds`` are of each task's dropout; ``smoothing`` is of its labels.
        """
        self._model.train()
        with self._mixture.of(batch.spans, seeds):
            losses = self._losses(batch, smoothing)
            total = (losses.sums * losses.sums.new_tensor(weights)).sum()
            torch.autograd.backward(total)
        return PassLosses(tuple(each.detach() for each in losses.tokens), losses.row_tokens)

    @torch.no_grad()
    def evaluate(self, batch: MixedBatch) -> PassLosses:
        """Return the losses without dropout and smoothing."""
        self._model.eval()
        with self._mixture.of(batch.spans):
            return self._losses(batch, [0.0] * len(batch.spans))

    def _losses(self, batch: MixedBatch, smoothing: Sequence[float]) -> PassLosses:
        batch = batch.to(self.device)
        with self._precision():
            logits: Tensor = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.predicting,
                grids=batch.grids,
            ).logits[0]
            losses = tuple(
                F.cross_entropy(
                    logits[start:end].float(),
                    batch.targets[start:end],
                    reduction="none",
                    label_smoothing=smooth,
                )
                for (start, end), smooth in zip(batch.trained_spans, smoothing, strict=True)
            )
        return PassLosses(losses, batch.row_tokens)

    def _precision(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)
