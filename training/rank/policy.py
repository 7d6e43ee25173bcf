"""What the loop asks of an adapter's rank. Fixed is peft as it is; growing and AdaLoRA answer the same calls.

The loop's order: ``attach`` (or, when it returns None, manylora.training.bases.lora.attach with ``initial_rank``),
``prepare``, ``restore`` when a run goes on, ``optimizer_groups``, ``scheduler``; then, for every optimiser step,
``before_step``, ``penalty`` and ``after_backward``; ``save`` at any border between two steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.training.bases.settings import LoraSettings
    from manylora.training.bases.types import Base

ParameterGroup: TypeAlias = dict[str, Any]
"""A parameter group as torch's optimisers take it: ``params`` and settings (lr, weight_decay, …)."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a run is, at the border between two optimiser steps."""

    step: int
    """Optimiser steps done so far."""
    total_steps: int
    optimizer: Optimizer
    """The plain optimiser, without accelerate's wrapper."""
    scheduler: LRScheduler | None


class RankPolicy(Protocol):
    """How the rank behaves over a run. One object for one run; the loop calls it, it never calls the loop."""

    @property
    def initial_rank(self) -> int:
        """The rank that the adapter is attached with; the LoRA settings' alpha belongs to it."""

    @property
    def final_rank(self) -> int:
        """The largest rank of the run, which memory must be planned for."""

    @property
    def rank(self) -> int:
        """The rank now; of AdaLoRA, whose modules differ, the largest."""

    def attach(self, base: "Base", lora: "LoraSettings", total_steps: int) -> "PeftModel | None":
        """Make the adapter on the base, or return None where bases/lora.py's attach with ``initial_rank`` does.

        ``total_steps`` are the optimiser steps of the whole run. Raises InvalidArgument where the settings or the base
        don't go with this policy.
        """

    def prepare(self, model: "PeftModel") -> None:
        """Make the model what it is at step 0. Called once, before the optimiser is made."""

    def optimizer_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[ParameterGroup]:
        """Split the groups that hold all trained parameters into those that the optimiser is made with.

        Called right before the optimiser is made; after ``restore`` its groups then fit the saved optimiser's.
        """

    def scheduler(self, scheduler: LRScheduler) -> None:
        """Take in the scheduler, right after it is made. Raises InvalidArgument for one that can't be carried on."""

    def before_step(self, model: "PeftModel", at: Moment) -> bool:
        """Change the rank if it is time. Returns whether trained parameters changed, so that DDP is wrapped anew.

        Called before the first micro-batch of every optimiser step, never inside an accumulation window.
        """

    def penalty(self, model: "PeftModel") -> Tensor | None:
        """Return a term [] of the loss that doesn't depend on the data, or None.

        It belongs to the loss of an optimiser step once: each of n micro-batches adds 1/n of it.
        """

    def after_backward(self, model: "PeftModel", at: Moment) -> None:
        """Look at the whole window's gradients. Called after the optimiser's step, which ``at`` doesn't count yet, and
        before they are zeroed."""

    def save(self, model: "PeftModel", directory: Path, *, resumable: bool) -> None:
        """Write adapter_config.json and adapter_model.safetensors, an ordinary PEFT adapter; with ``resumable`` also
        what ``restore`` needs beside them."""

    def restore(self, model: "PeftModel", directory: Path) -> None:
        """Rebuild the trained modules as they were saved and load their values. Called after ``prepare`` and before
        the optimiser is made, whose saved state then fits."""
