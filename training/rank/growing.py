"""A rank that grows by a schedule: ``--rank_schedule 8:0,16:0.3,64:0.6``.

At a growth every adapted matrix gets a slice that changes no output (training/rank/slices.py) and that the running
optimiser takes in as new (training/rank/groups.py); of the old slices it keeps all it knows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from manylora.training.bases.save import load_adapter, save_adapter
from manylora.training.errors import InvalidArgument
from manylora.training.rank.groups import (
    Growth,
    add_slices,
    lambda_scheduler,
    warm_up_slices,
    with_slices_apart,
)
from manylora.training.rank.policy import Moment, ParameterGroup
from manylora.training.rank.schedule import RankSchedule
from manylora.training.rank.slices import SlicedLayer, alpha_at, kaiming_rows, slice_layers

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.training.bases.settings import LoraSettings
    from manylora.training.bases.types import Base

STATE_FILE = "rank_state.json"
WARMUP_SHARE = 0.02
"""Of the run's steps."""

DrawRows = Callable[[int, Tensor, torch.Generator], Tensor]
"""(how many, the old A [rank, in], generator) -> new rows [how many, in]."""


class GrowingRank:
    """The policy of a run whose rank grows. ``seed`` makes the new rows, the same in every process."""

    def __init__(
        self,
        schedule: RankSchedule,
        *,
        seed: int,
        draw_rows: DrawRows = kaiming_rows,
        warmup_share: float = WARMUP_SHARE,
    ) -> None:
        self.schedule = schedule
        self.growths: list[Growth] = []
        self._seed, self._draw_rows, self._warmup_share = seed, draw_rows, warmup_share
        self._layers: list[SlicedLayer] = []
        self._initial_alpha = 0.0

    @property
    def initial_rank(self) -> int:
        """The schedule's first rank."""
        return self.schedule.initial_rank

    @property
    def final_rank(self) -> int:
        """The schedule's last rank."""
        return self.schedule.final_rank

    @property
    def rank(self) -> int:
        """The rank now."""
        return self.growths[-1].rank if self.growths else self.initial_rank

    def attach(self, base: "Base", lora: "LoraSettings", total_steps: int) -> "PeftModel | None":
        """Leave it to manylora.training.bases.lora.attach."""
        return None

    def prepare(self, model: "PeftModel") -> None:
        """Make the adapter's A and B growable. Raises InvalidArgument for an adapter that can't be."""
        config = model.peft_config[model.active_adapter]
        if config.r != self.initial_rank:
            raise InvalidArgument(
                f"--rank_schedule {self.schedule} begins with rank {self.initial_rank}, but the adapter has rank "
                f"{config.r}; begin the schedule with the adapter's rank."
            )
        self._initial_alpha = config.lora_alpha
        self._layers = slice_layers(model)

    def optimizer_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[ParameterGroup]:
        """Give the slices of past growths groups of their own."""
        return with_slices_apart(groups, self._layers)

    def scheduler(self, scheduler: LRScheduler) -> None:
        """Give the slices of past growths their warm-ups. Raises InvalidArgument unless it is a LambdaLR.

        All of transformers' schedules are, but for those that look at the loss.
        """
        warm_up_slices(lambda_scheduler(scheduler), self._layers, self.growths)

    def before_step(self, model: "PeftModel", at: Moment) -> bool:
        """Grow if the schedule says so."""
        rank = self.schedule.stages[self.schedule.stage_at(at.step, at.total_steps)].rank
        if rank <= self.rank:
            return False
        scheduler = lambda_scheduler(at.scheduler)
        warmup_steps = max(1, round(self._warmup_share * at.total_steps))
        self._grow(model, Growth(rank, scheduler.last_epoch, warmup_steps))
        add_slices(at.optimizer, scheduler, self._layers, len(self.growths), self.growths[-1])
        return True

    def penalty(self, model: "PeftModel") -> Tensor | None:
        """Return None."""
        return None

    def after_backward(self, model: "PeftModel", at: Moment) -> None:
        """Do nothing: the schedule doesn't look at gradients."""

    def save(self, model: "PeftModel", directory: Path, *, resumable: bool) -> None:
        """Write the slices as one A and one B, with the grown rank and alpha."""
        save_adapter(model, directory)
        if resumable:
            state = {"schedule": str(self.schedule), "growths": [asdict(growth) for growth in self.growths]}
            (directory / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def restore(self, model: "PeftModel", directory: Path) -> None:
        """Slice the adapter as it was sliced, and load its values. A rank that has grown beyond goes back.

        Raises InvalidArgument when the checkpoint isn't one of this schedule.
        """
        growths = self._read_growths(directory / STATE_FILE)
        while self.growths:
            self.growths.pop()
            for layer in self._layers:
                layer.shrink(*self._rank_and_alpha(model))
        for growth in growths:
            self._grow(model, growth)
        self._set_config(model)
        load_adapter(model, directory)

    def _grow(self, model: "PeftModel", growth: Growth) -> None:
        generator = torch.Generator().manual_seed(self._seed + len(self.growths))
        old_rank = self.rank
        self.growths.append(growth)
        rank, alpha = self._rank_and_alpha(model)
        for layer in self._layers:
            layer.grow(rank, alpha, self._draw_rows(rank - old_rank, layer.a.weight, generator))
        self._set_config(model)

    def _rank_and_alpha(self, model: "PeftModel") -> tuple[int, float]:
        rslora: bool = model.peft_config[model.active_adapter].use_rslora
        return self.rank, alpha_at(self.rank, self.initial_rank, self._initial_alpha, rslora=rslora)

    def _set_config(self, model: "PeftModel") -> None:
        config = model.peft_config[model.active_adapter]
        config.r, config.lora_alpha = self._rank_and_alpha(model)

    def _read_growths(self, path: Path) -> list[Growth]:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            schedule, growths = state["schedule"], [Growth(**growth) for growth in state["growths"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise InvalidArgument(
                f"{path} can't be read: {path.parent} isn't a checkpoint of a run with --rank_schedule; "
                "go on without it, or start anew with --from_adapter."
            ) from None
        if schedule != str(self.schedule):
            raise InvalidArgument(
                f"{path.parent} was trained with --rank_schedule {schedule}, this run has {self.schedule}; "
                "go on with the same schedule."
            )
        return growths
