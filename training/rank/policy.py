"""What the loop asks of an adapter's rank. Fixed is peft as it is; growing and AdaLoRA answer the same five calls."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from peft import PeftModel


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

    def prepare(self, model: "PeftModel") -> None:
        """Make the model what it is at step 0. Called once, before the optimiser is made."""

    def before_step(self, model: "PeftModel", at: Moment) -> bool:
        """Change the rank if it is time. Returns whether trained parameters changed, so that DDP is wrapped anew.

        Called before the first micro-batch of every optimiser step, never inside an accumulation window.
        """

    def after_backward(self, model: "PeftModel", at: Moment) -> None:
        """Look at the whole window's gradients. Called after the optimiser's step and before they are zeroed."""

    def save(self, model: "PeftModel", directory: Path, *, resumable: bool) -> None:
        """Write adapter_config.json and adapter_model.safetensors, an ordinary PEFT adapter; with ``resumable`` also
        what ``restore`` needs beside them."""

    def restore(self, model: "PeftModel", directory: Path) -> None:
        """Rebuild the trained modules as they were saved and load their values. Called after ``prepare`` and before
        the optimiser is made, whose saved state then fits."""
