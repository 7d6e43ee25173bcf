"""What a new slice is to the optimiser and its scheduler: a parameter group of its own, warmed up on its own.

A group is copied from the one that holds the matrix's first slice, so its weight decay, betas and learning rate
(LoRA+ gives B another) are that one's. Adam counts the steps of a new parameter from 0, so its bias correction is
right; with the old count and no moments, the first updates would be about three times the learning rate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from manylora.training.errors import InvalidArgument
from manylora.training.rank.policy import ParameterGroup
from manylora.training.rank.slices import SlicedLayer


@dataclass(frozen=True, slots=True)
class Growth:
    """One growth that has happened."""

    rank: int
    """The rank that it led to."""
    step: int
    """The scheduler's step that was the new slices' first."""
    warmup_steps: int
    """How many steps their learning rate takes to rise to that of the old ones, at least 1."""

    def factor(self, step: int) -> float:
        """Return the share of the old slices' learning rate that the new ones take at the scheduler's ``step``."""
        return min(1.0, (step - self.step + 1) / self.warmup_steps)


def with_slices_apart(
    groups: Sequence[Mapping[str, Any]], layers: Sequence[SlicedLayer]
) -> list[ParameterGroup]:
    """Take all but the first slices out of ``groups`` and append groups of their own, growth by growth.

    That is how ``add_slices`` left the optimiser of a run that was never broken off, so its saved state fits.
    """
    grown = {id(part) for layer in layers for half in (layer.a, layer.b) for part in half.slices[1:]}
    old = [{**group, "params": [p for p in group["params"] if id(p) not in grown]} for group in groups]
    count = len(layers[0].a.slices) - 1 if layers else 0
    return old + [group for number in range(1, count + 1) for _, group in _slice_groups(old, layers, number)]


def add_slices(
    optimizer: Optimizer, scheduler: LambdaLR, layers: Sequence[SlicedLayer], number: int, growth: Growth
) -> None:
    """Add the slices of growth ``number`` (from 1) to a running optimiser and its scheduler."""
    for origin, group in _slice_groups(optimizer.param_groups, layers, number):
        optimizer.add_param_group(group)
        scheduler.lr_lambdas.append(warmed(scheduler.lr_lambdas[origin], growth))
        scheduler.base_lrs.append(scheduler.base_lrs[origin])
        rate = scheduler.base_lrs[-1] * scheduler.lr_lambdas[-1](scheduler.last_epoch)
        optimizer.param_groups[-1]["lr"] = rate
        scheduler._last_lr.append(rate)


def warm_up_slices(scheduler: LambdaLR, layers: Sequence[SlicedLayer], growths: Sequence[Growth]) -> None:
    """Give the groups that ``with_slices_apart`` made the warm-ups that ``add_slices`` gave them."""
    growth_of = {
        id(half.slices[number]): growth
        for number, growth in enumerate(growths, 1)
        for layer in layers
        for half in (layer.a, layer.b)
    }
    for index, group in enumerate(scheduler.optimizer.param_groups):
        growth = growth_of.get(id(group["params"][0])) if group["params"] else None
        if growth is not None:
            scheduler.lr_lambdas[index] = warmed(scheduler.lr_lambdas[index], growth)


def warmed(schedule: Callable[[int], float], growth: Growth) -> Callable[[int], float]:
    """Return the old slices' schedule with the new slices' warm-up.

    A plain function: the scheduler's saved state then holds nothing of it.
    """

    def factor(step: int) -> float:
        return schedule(step) * growth.factor(step)

    return factor


def lambda_scheduler(scheduler: LRScheduler | None) -> LambdaLR:
    """Return the scheduler when groups can be added to it. Raises InvalidArgument when they can't."""
    # accelerate may have wrapped it.
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        raise InvalidArgument(
            f"--rank_schedule adds parameters during the run, which a {type(scheduler).__name__} can't take; choose "
            "--lr_scheduler_type linear, cosine, constant or another that depends on the step alone."
        )
    return scheduler


def _slice_groups(
    groups: Sequence[Mapping[str, Any]], layers: Sequence[SlicedLayer], number: int
) -> list[tuple[int, ParameterGroup]]:
    """Return (index of the group that it is copied from, new group); A before B, in the model's order."""
    halves = [half for layer in layers for half in (layer.a, layer.b)]
    found = []
    for index, group in enumerate(groups):
        members = {id(parameter) for parameter in group["params"]}
        slices = [half.slices[number] for half in halves if id(half.slices[0]) in members]
        if slices:
            found.append((index, {**group, "params": slices}))
    if sum(len(group["params"]) for _, group in found) != len(halves):
        raise InvalidArgument(
            "--rank_schedule needs an optimiser that holds the adapter's own parameters, not shards of them; "
            "train with one process or DDP."
        )
    return found
