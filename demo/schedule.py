"""Learning rates over a training run. No optimizer and no model in here."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a level stretch, then a linear fall to a twentieth over the last part of the run."""

    steps: int
    warmup: int
    fall: float
    """The share of the steps in which the rate falls."""

    def share(self, step: int) -> float:
        """The share of the peak rate at a step, counted from zero."""
        rising = (step + 1) / self.warmup
        falling = (self.steps - step) / (self.steps * self.fall)
        return min(1.0, rising, 0.05 + 0.95 * falling)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's rate to `share` of the one that the optimizer was made with."""
    for group in optimizer.param_groups:
        group["lr"] = share * optimizer.defaults["lr"]
