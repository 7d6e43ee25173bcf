"""transformers' Trainer as a run needs it: an exact loss, a rank that may change, and a way back when it goes wrong.

Data order, mixed precision, DDP, DeepSpeed, FSDP, schedules and logging are transformers' and accelerate's.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manylora.training.errors import DoesNotFit
from manylora.training.evaluate.best import BestCheckpoint
from manylora.training.loop.evaluation import evaluate_loss
from manylora.training.loop.events import Events
from manylora.training.loop.guarded import GuardedTrainer, WindowRows
from manylora.training.loop.loss import token_losses
from manylora.training.loop.out_of_memory import is_out_of_memory
from manylora.training.loop.resuming import GoesOn
from manylora.training.loop.saving import CheckpointSaving
from manylora.training.loop.sharding import shard_on_cpu
from manylora.training.loop.split import in_parts, rows_of
from manylora.training.loop.watch import GuardSettings
from manylora.training.rank.policy import RankPolicy

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What transformers' arguments have no name for."""

    on_divergence: str = "backoff"
    """backoff, stop or ignore."""
    loraplus_lr_ratio: float | None = None
    guard: str = "on"
    """off, warn or on."""


class LoraTrainer(GuardedTrainer, CheckpointSaving, BestCheckpoint):
    """Trains an adapter. The loss of an optimiser step is the mean over the trained tokens of its whole window.

    ``model`` is what the policy attached. Raises Diverged or DoesNotFit where a run can't go on.
    """

    model: "PeftModel"
    model_wrapped: nn.Module
    optimizer: Optimizer | None

    def __init__(
        self,
        model: "PeftModel",
        args: TrainingArguments,
        policy: RankPolicy,
        settings: LoopSettings | None = None,
        **trainer: Any,  # train_dataset, data_collator, …: transformers' own parameters
    ) -> None:
        policy.prepare(model)
        # Datasets hold what the model takes and nothing else.
        args.remove_unused_columns = False
        # Else the order of the data hangs on whatever seeded torch last.
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        super().__init__(model=model, args=args, **trainer)
        self.policy = policy
        self.settings = settings or LoopSettings()
        self.events = Events()
        # Counts the window's trained tokens, over all processes, and leaves dividing by them to compute_loss.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.more_metrics: Callable[[], Mapping[str, float]] | None = None
        """Called at each evaluation in all processes: what else the first one measures, by its names."""
        self.micro_rows: int | None = None
        """Rows that fit into memory at once; None until a micro-batch didn't."""
        self.eval_rows: int | None = None
        """The same of an evaluation."""
        self.trained_tokens = 0
        """That the loss was taken over since this process began."""
        self._window: list[Mapping[str, Tensor]] = []
        self.window_loss = 0.0
        self._ends_window = False
        self.start_watching(GuardSettings(self.settings.guard, self.settings.on_divergence))
        self.add_callback(_PolicyCallback(self))
        self.add_callback(GoesOn(self))

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, which shards on CPUs too."""
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, self.args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    # --- the model's optimiser and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimiser over the policy's groups."""
        if self.optimizer is not None:
            return self.optimizer
        from manylora.training.bases.lora import lora_parameter_groups

        args = self.args
        kind, options = self.get_optimizer_cls_and_kwargs(args, model or self.model)
        groups = lora_parameter_groups(
            model or self.model, args.learning_rate, args.weight_decay, self.settings.loraplus_lr_ratio
        )
        made: Optimizer = kind(self.policy.optimizer_groups(groups), **options)
        self.optimizer = made
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Make the schedule and hand it to the policy."""
        scheduler: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
        self.policy.scheduler(scheduler)
        return scheduler

    def _run_epoch(self, **named: Any) -> None:
        """Take no step where a resumed run is already as far as it was to go; transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**named)

    # --- one optimiser step

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Mapping[str, Tensor]], Tensor | int | None]:
        """Fetch a window of micro-batches. Called between two optimiser steps, so the rank may change here."""
        self._window, self.window_loss, self._rows = [], 0.0, WindowRows()
        if self.policy.before_step(self.model, self.moment()):
            self._after_rank_change()
        self.watch.begin_step(self.state.max_steps)
        samples: tuple[list[Mapping[str, Tensor]], Tensor | int | None] = super().get_batch_samples(
            epoch_iterator, num_batches, device
        )
        self.trained_tokens += int(samples[1] or 0)
        return samples

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch forward and backward, in pieces once memory has run out."""
        self._window.append(inputs)
        while True:
            try:
                loss = self._in_pieces(inputs, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                self.window_loss += float(loss)
                return loss
            # Outside the except block, so that the error's frames, which hold tensors, are gone.
            self._use_smaller_pieces(inputs)
            self._start_window_anew(num_items_in_batch)

    def _in_pieces(self, inputs: Mapping[str, Tensor], num_items: Tensor | int | None) -> Tensor:
        rows = self.micro_rows
        parts = in_parts(inputs, rows)
        total = torch.zeros((), device=self.args.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1 and self.accelerator.sync_gradients
            self._ends_window = last
            with nullcontext() if last else self.accelerator.no_sync(self.model_wrapped):
                total += super().training_step(self.model_wrapped, dict(part), num_items)
        return total

    def _use_smaller_pieces(self, inputs: Mapping[str, Tensor]) -> None:
        rows = min(rows_of(inputs), self.micro_rows or rows_of(inputs))
        if self.args.world_size > 1:
            raise DoesNotFit(
                "out of memory in one of several processes, which can't change its batch alone: start again with"
                " half the --per_device_train_batch_size and twice the --gradient_accumulation_steps"
            )
        if rows == 1:
            raise DoesNotFit(
                f"out of memory with one row of {inputs['input_ids'].shape[1]} tokens: add --gradient_checkpointing,"
                " --q_lora, or a smaller --model_max_length; `manylora plan` says what each saves"
            )
        self.micro_rows = rows // 2
        self.events.say(
            self.state.global_step,
            "split",
            f"out of memory with {rows} rows at once: going on with {self.micro_rows}, and more accumulation; the"
            " global batch and the loss stay what they are",
        )

    def _start_window_anew(self, num_items: Tensor | int | None) -> None:
        """Drop the window's gradients, which hold part of what failed, and redo its earlier micro-batches."""
        self._rows = WindowRows()
        self.model_wrapped.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for earlier in self._window[:-1]:
            with self.accelerator.no_sync(self.model_wrapped):
                self._in_pieces(earlier, num_items)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return Σ cross-entropy / trained tokens of the window.

        Those of all processes, and DDP's mean over processes is undone; each process's own with
        --average_tokens_across_devices False, and then that mean is what was asked for.
        """
        if return_outputs:
            raise NotImplementedError("outputs are not kept: logits exist at trained positions alone")
        losses, owner = token_losses(model, inputs, self.args.label_smoothing_factor)
        total = losses.sum()
        if num_items_in_batch is None:
            return total / max(losses.numel(), 1)
        self._rows.add(losses, owner, rows_of(inputs))
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        # A window of rows without a trained token has the loss 0, not 0/0.
        loss = total / torch.as_tensor(num_items_in_batch).clamp(min=1) * processes
        penalty = self.policy.penalty(self.model) if self._ends_window else None
        return loss if penalty is None else loss + penalty

    def evaluation_loop(self, dataloader: Any, description: str, *_: Any, **named: Any) -> Any:
        """Evaluate by the mean over trained tokens, whatever the batches."""
        try:
            found = evaluate_loss(self, dataloader, named.get("metric_key_prefix", "eval"))
        except DoesNotFit as error:
            if self.is_in_train and self.args.world_size == 1:
                self._save_checkpoint(self.model, None)
                raise DoesNotFit(
                    f"{error}; the run goes on from step {self.state.global_step} with --resume"
                ) from None
            raise
        found.metrics.update(self._more_metrics())
        return found

    def _more_metrics(self) -> Mapping[str, float]:
        mine = [dict(self.more_metrics()) if self.more_metrics is not None else {}]
        if self.args.world_size > 1:
            # One process measures; all must decide alike on stopping and on the best.
            torch.distributed.broadcast_object_list(mine, src=0)
        return mine[0]

    def _after_rank_change(self) -> None:
        self.watch.rank_changed()
        if isinstance(self.model_wrapped, DistributedDataParallel):
            # DDP made its buckets of the parameters that there were. The old wrapper never runs again.
            self.model_wrapped = self._wrap_ddp_anew(self.model_wrapped)

    def _wrap_ddp_anew(self, old: DistributedDataParallel) -> nn.Module:
        models = self.accelerator._models
        models[:] = [each for each in models if each is not old]
        wrapped: nn.Module = self.accelerator.prepare_model(old.module)
        return wrapped


class _PolicyCallback(TrainerCallback):
    """Calls the policy where transformers has an event and no method: between the step and zero_grad."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Let the policy see the gradients of the whole window; those that overflowed in fp16 are none."""
        if self.trainer.step_is_skipped:
            for parameter in self.trainer.model.parameters():
                parameter.grad = None
        self.trainer.policy.after_backward(self.trainer.model, self.trainer.moment())
