"""One task of a run: its adapter, data, optimiser and schedule. It knows nothing of the others, nor of the base's pass.

What it does is what training it alone would do: the same rows, loss, clipping, optimiser, schedule, rank policy and
guard, so that its adapter comes out the same.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerState, get_scheduler

from manylora.training.bases.lora import lora_parameter_groups
from manylora.training.job import total_steps
from manylora.training.loop.events import Events
from manylora.training.loop.guard import Guard, Trouble
from manylora.training.loop.snapshot import Snapshot, slow_down
from manylora.training.loop.trainer import MOST_BACKOFFS, SLOWER, SNAPSHOT_STEPS
from manylora.training.rank.policy import Moment, RankPolicy
from manylora.training.tasks.batch import Row
from manylora.training.tasks.order import DataOrder
from manylora.training.tasks.plan import Task

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(slots=True)
class _SinceLog:
    loss: float = 0.0
    steps: int = 0


class Member:
    """A task while it is trained. ``train_rows`` and ``eval_rows`` are map-style data sets of rows."""

    def __init__(
        self,
        task: Task,
        model: "PeftModel",
        policy: RankPolicy,
        train_rows: Sequence[Row],
        eval_rows: Sequence[Row] = (),
    ) -> None:
        self.name, self.args, self.model, self.policy = task.name, task.training, model, policy
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self.events = Events()
        self.order = DataOrder.of(self.args, len(train_rows))
        self.total_steps = total_steps(self.args, len(train_rows))
        self.state = TrainerState(max_steps=self.total_steps, epoch=0.0)
        self.stopped = ""
        """Why it ended early; empty where it didn't."""
        self.rate_ratio = task.arguments.lora.loraplus_lr_ratio
        self.on_divergence = task.arguments.run.on_divergence
        self.guard = Guard(self.total_steps)
        self.backoffs = 0
        self._snapshot: Snapshot | None = None
        self._since_log = _SinceLog()
        self._all_losses = 0.0
        self.optimizer: Optimizer
        self.scheduler: LRScheduler
        policy.prepare(model)

    def make_optimizer(self) -> None:
        """Make optimiser and schedule. After the policy has restored a checkpoint's rank, and before its states are."""
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = lora_parameter_groups(
            self.model, self.args.learning_rate, self.args.weight_decay, self.rate_ratio
        )
        self.optimizer = kind(self.policy.optimizer_groups([dict(group) for group in groups]), **options)
        self.scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=self.args.get_warmup_steps(self.total_steps),
            num_training_steps=self.total_steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        self.policy.scheduler(self.scheduler)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state.global_step)

    @property
    def finished(self) -> bool:
        """Whether it takes no further part."""
        return bool(self.stopped) or self.step >= self.total_steps

    @property
    def train_loss(self) -> float | None:
        """The mean of all steps' losses so far; None before the first."""
        return self._all_losses / self.step if self.step else None

    @property
    def epoch_is_over(self) -> bool:
        """Whether the last step was an epoch's last."""
        return self.step % self.order.steps_per_epoch == 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What it trains."""
        return [each for group in self.optimizer.param_groups for each in group["params"]]

    def dropout_seed(self, micro_batch: int) -> int:
        """Return 32 bits that no other step and micro-batch of this task has, as far as 32 bits go."""
        return zlib.crc32(f"{self.args.seed} {self.step} {micro_batch}".encode())

    def open_window(self) -> list[list[Row]]:
        """Return the rows of each micro-batch of the next step; the rank may change here."""
        if self.policy.before_step(self.model, self._moment()):
            self._snapshot = None
        if self._snapshot is None and self.on_divergence == "backoff":
            self._take_snapshot()
        return [[self.train_rows[number] for number in numbers] for numbers in self.order.window(self.step)]

    def close_window(self, loss: float) -> dict[str, float] | None:
        """Take the step that the window's gradients ask for; ``loss`` is the window's. Returns what is to be logged."""
        limit = self.args.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit if limit and limit > 0 else math.inf))
        if self.on_divergence != "ignore":
            self._watch(loss, norm)
            if self.stopped:
                return None
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.policy.after_backward(self.model, self._moment())
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.state.epoch = self.step / self.order.steps_per_epoch
        self._all_losses += loss
        self._since_log.loss += loss
        self._since_log.steps += 1
        return self._log(norm, rate) if self._log_is_due() else None

    def log(self, values: dict[str, float]) -> None:
        """Keep values with the step that they belong to."""
        self.state.log_history.append({**values, "epoch": self.state.epoch, "step": self.step})

    def evaluation_is_due(self) -> bool:
        """Whether the held-out rows are to be judged now, after a step."""
        if not len(self.eval_rows) or self.finished:
            return False  # the last evaluation is made for all at the end
        strategy = str(self.args.eval_strategy.value)
        if strategy == "epoch":
            return self.epoch_is_over
        return strategy == "steps" and self.step % self._every(self.args.eval_steps) == 0

    # --- checkpoints

    def save(self, directory: Path) -> None:
        """Write what ``restore`` needs into an empty directory; the adapter in it is an ordinary one."""
        self.policy.save(self.model, directory, resumable=True)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "guard": self.guard.state(),
            "backoffs": self.backoffs,
            "stopped": self.stopped,
            "since_log": (self._since_log.loss, self._since_log.steps),
            "all_losses": self._all_losses,
        }
        torch.save(state, directory / "task.pt")
        self.state.save_to_json(str(directory / "trainer_state.json"))

    def restore(self, directory: Path) -> None:
        """Make the task what it was when it was saved, with optimiser and schedule."""
        self.policy.restore(self.model, directory)
        self.make_optimizer()
        state: dict[str, Any] = torch.load(directory / "task.pt", weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.guard = Guard.restore(state["guard"])
        self.guard.total_steps = self.total_steps
        self.backoffs, self.stopped = state["backoffs"], state["stopped"]
        self._since_log = _SinceLog(*state["since_log"])
        self._all_losses = state["all_losses"]
        self.state = TrainerState.load_from_json(str(directory / "trainer_state.json"))

    # --- when it goes wrong

    def _watch(self, loss: float, norm: float) -> None:
        trouble = self.guard.observe(loss, norm)
        if trouble is not None:
            self._answer(trouble)
        elif (
            self._snapshot is not None
            and self.guard.is_calm
            and self.step - self._snapshot.step >= SNAPSHOT_STEPS
        ):
            self._take_snapshot()

    def _answer(self, trouble: Trouble) -> None:
        if not trouble.is_fatal:
            self.events.say(self.step, trouble.kind, trouble.sentence)
            return
        if self._snapshot is None or self.backoffs == MOST_BACKOFFS:
            after = f" after {self.backoffs} steps back" if self.backoffs else ""
            self.stopped = f"stopped at step {self.step + 1}{after}: {trouble.sentence}"
            self.events.say(self.step, "stop", self.stopped)
            return
        self.backoffs += 1
        self._snapshot.put_back(self.model, self.optimizer)
        slow_down(self.optimizer, self.scheduler, SLOWER)
        self.guard.forget_recent()
        back = f"{trouble.sentence}. Back to the state of step {self._snapshot.step}, at half the rate"
        self.events.say(self.step, "backoff", back)

    def _take_snapshot(self) -> None:
        self._snapshot = Snapshot.take(self.step, self.model, self.optimizer)

    # --- logging

    def _log_is_due(self) -> bool:
        if self.step == 1 and self.args.logging_first_step:
            return True
        strategy = str(self.args.logging_strategy.value)
        if strategy == "epoch":
            return self.epoch_is_over
        return strategy == "steps" and self.step % self._every(self.args.logging_steps) == 0

    def _every(self, steps: float | None) -> int:
        """Return a number of steps; below 1 it was a share of all."""
        if steps is None:
            return self._every(self.args.logging_steps)
        return max(1, math.ceil(self.total_steps * steps if steps < 1 else steps))

    def _log(self, norm: float, rate: float) -> dict[str, float]:
        since = self._since_log
        values = {"loss": since.loss / since.steps, "grad_norm": norm, "learning_rate": rate}
        self._since_log = _SinceLog()
        self.log(values)
        return values

    def _moment(self) -> Moment:
        return Moment(self.step, self.total_steps, self.optimizer, self.scheduler)
