"""Which rows a task's optimiser steps take: the same, in the same order, as transformers' Trainer takes them alone."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import TrainingArguments

from manylora.training.errors import InvalidArgument


@dataclass
class DataOrder:
    """A pure function of the step, so that a run goes on anywhere with nothing restored."""

    rows: int
    batch_size: int
    accumulation: int
    """Micro-batches of one optimiser step; an epoch's last step has what is left."""
    seed: int
    shuffled: bool = True
    drop_last: bool = False
    _drawn: tuple[int, Tensor] | None = field(default=None, repr=False)
    """The last epoch asked for, and its order."""

    @classmethod
    def of(cls, args: TrainingArguments, rows: int) -> "DataOrder":
        """Return the order that ``args`` ask for. Raises InvalidArgument where no batch can be made."""
        order = cls(
            rows=rows,
            batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffled=str(args.train_sampling_strategy) != "sequential",
            drop_last=args.dataloader_drop_last,
        )
        if not order.batches:
            raise InvalidArgument(
                f"{rows} rows make no batch of {order.batch_size}: leave --dataloader_drop_last out, or give a smaller"
                " --per_device_train_batch_size"
            )
        return order

    @property
    def batches(self) -> int:
        """Micro-batches of an epoch."""
        return self.rows // self.batch_size if self.drop_last else math.ceil(self.rows / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(self.batches / self.accumulation)

    def window(self, step: int) -> list[list[int]]:
        """Return the row numbers of each micro-batch of optimiser step ``step``, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        first = within * self.accumulation
        numbers = range(first, min(first + self.accumulation, self.batches))
        return [order[at * self.batch_size : (at + 1) * self.batch_size].tolist() for at in numbers]

    def _epoch(self, epoch: int) -> Tensor:
        """Return an epoch's rows in order; shuffled as accelerate's SeedableRandomSampler does it."""
        if self._drawn is None or self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = (
                torch.randperm(self.rows, generator=generator) if self.shuffled else torch.arange(self.rows)
            )
            self._drawn = (epoch, order)
        return self._drawn[1]
