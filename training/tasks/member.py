"""One task of a run: its adapter, data, optimiser and schedule. It knows nothing of the others, nor of the base's pass.

What it does is what training it alone would do: the same rows, loss, clipping, optimiser, schedule, rank policy and
guard, so that its adapter comes out the same.
"""

import math
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerState, get_scheduler

from manylora.training.bases.lora import lora_parameter_groups
from manylora.training.errors import Diverged
from manylora.training.job import total_steps
from manylora.training.loop.against_base import worse_than_base
from manylora.training.loop.events import Events
from manylora.training.loop.guard import Rows
from manylora.training.loop.guarded import HELD_OUT_ROWS, adapter_off
from manylora.training.loop.last_rows import MOST_ROWS
from manylora.training.loop.masked import MaskedRows
from manylora.training.loop.verdict import Verdict
from manylora.training.loop.watch import GuardSettings, Watch
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


@dataclass(frozen=True, slots=True)
class WindowLoss:
    """What a step's rows cost."""

    loss: float
    """The mean over their trained tokens; 0 where there is none."""
    rows: Rows
    """Of those with a trained token."""
    drawn: int
    """Rows, with and without one."""


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
        self.worse = ""
        """How it ended worse than the base alone; empty where it didn't."""
        self.rate_ratio = task.arguments.lora.loraplus_lr_ratio
        run = task.arguments.run
        settings = GuardSettings(run.guard, run.on_divergence)
        self.watch = Watch(self, settings, lambda: adapter_off(self.model))
        self.masked = MaskedRows()
        self.losses_of: Callable[[Sequence[Row]], list[float]]
        """Returns the losses of rows through the base that all tasks share; the run sets it."""
        self._last_rows: deque[Row] = deque(maxlen=MOST_ROWS)
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
        if self.policy.before_step(self.model, self.moment()):
            self.watch.rank_changed()
        self.watch.begin_step(self.total_steps)
        window = [[self.train_rows[number] for number in numbers] for numbers in self.order.window(self.step)]
        for rows in window:
            self._last_rows.extend(rows)
        return window

    def close_window(self, window: WindowLoss) -> dict[str, float] | None:
        """Take the step that the window's gradients ask for. Returns what is to be logged."""
        limit = self.args.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit if limit and limit > 0 else math.inf))
        self._look(window, norm)
        if self.stopped:
            return None
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.policy.after_backward(self.model, self.moment())
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self.state.epoch = self.step / self.order.steps_per_epoch
        self._all_losses += window.loss
        self._since_log.loss += window.loss
        self._since_log.steps += 1
        if self.finished:
            self._tell_masked()
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
        """Write what ``restore`` needs into an empty directory; the adapter in it is an ordinary one.

        A task that is found astray then goes back before, or is stopped.
        """
        if not self.finished:
            self._guarded(self.watch.before_saving)
        self.policy.save(self.model, directory, resumable=True)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "watch": self.watch.state(),
            "masked": (self.masked.count, self.masked.drawn),
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
        self.watch.restore(state["watch"])
        self.masked.count, self.masked.drawn = state["masked"]
        self.stopped = state["stopped"]
        self._since_log = _SinceLog(*state["since_log"])
        self._all_losses = state["all_losses"]
        self.state = TrainerState.load_from_json(str(directory / "trainer_state.json"))

    # --- what its guard looks at

    @property
    def trained(self) -> nn.Module:
        """Its model."""
        model: nn.Module = self.model
        return model

    def recent_losses(self) -> list[float]:
        """Return the losses of the last rows."""
        return self.losses_of(list(self._last_rows))

    def held_out_losses(self) -> list[float]:
        """Return the losses of the first held-out rows."""
        return self.losses_of([self.eval_rows[at] for at in range(min(HELD_OUT_ROWS, len(self.eval_rows)))])

    def agreed(self, verdict: Verdict) -> Verdict:
        """Return the verdict: there is one process."""
        return verdict

    def hold_against_base(self) -> None:
        """Say so where the task ended worse than it began: once, at its end."""
        worse = None if self.stopped else worse_than_base(self, lambda: adapter_off(self.model))
        if worse is not None:
            self.worse = worse
            self.events.say(self.step, "worse", f"The adapter is {worse}")

    def _look(self, window: WindowLoss, norm: float) -> None:
        """Let the guard look at the step before it is taken; a run that has to stop says why in ``stopped``."""
        masked = window.drawn - round(window.rows.count)
        self.masked.add(masked, window.drawn, self._note)
        if not window.rows.count:
            # Zeros would still move the weights by the optimiser's momentum and decay; what has no gradient stays.
            self.optimizer.zero_grad()
            return
        self._guarded(lambda: self.watch.look(window.rows, norm, loss=window.loss))

    def _guarded(self, look: Callable[[], None]) -> None:
        try:
            look()
        except Diverged as error:
            self.stopped = str(error)
            self.events.say(self.step, "stop", self.stopped)

    def _note(self, sentence: str) -> None:
        self.events.say(self.step, "note", sentence)

    def _tell_masked(self) -> None:
        sentence = self.masked.sentence()
        if sentence is not None:
            self._note(sentence)

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

    def moment(self) -> Moment:
        """Return where the run is."""
        return Moment(self.step, self.total_steps, self.optimizer, self.scheduler)
