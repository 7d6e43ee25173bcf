"""One prepared run and the trainers that are made of it: the run's own, and the short ones that look for a rate."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from manylora.training.arguments import Arguments, TrainingArguments
from manylora.training.data.collate import Collator
from manylora.training.distributed import world_size
from manylora.training.loop.trainer import LoopSettings, LoraTrainer
from manylora.training.preparation import Prepared
from manylora.training.rank.policy import RankPolicy

LOG_SHARE = 0.01
"""Of the steps, between two entries of the log, unless --logging_steps says otherwise."""
PAD_MULTIPLE = 8
"""Row lengths that a GPU's matrix units take without a rest."""


def total_steps(training: TrainingArguments, rows: int) -> int:
    """Return the optimiser steps of a run over ``rows`` rows, as transformers counts them."""
    if training.max_steps > 0:
        return int(training.max_steps)
    per_process = math.ceil(rows / world_size())
    batch: int = training.per_device_train_batch_size
    batches = (
        max(1, per_process // batch) if training.dataloader_drop_last else math.ceil(per_process / batch)
    )
    per_epoch = math.ceil(batches / int(training.gradient_accumulation_steps))
    return max(1, math.ceil(float(training.num_train_epochs) * per_epoch))


@dataclass
class Job:
    """What is trained, on what, and how."""

    arguments: Arguments
    prepared: Prepared
    changes: dict[str, Any] = field(default_factory=dict)
    """Training arguments that were settled since: a learning rate that was found, a batch that fits."""
    rows: tuple[Any, Any] | None = None
    """Map-style data sets to train and to evaluate on in the place of the prepared ones."""
    watchers: tuple[TrainerCallback, ...] = ()
    """Who looks on at every trainer of the job."""

    def training_arguments(self, **changes: Any) -> TrainingArguments:
        """Return transformers' arguments with the changes, settled for this loop."""
        arguments = _copy(self.arguments.training, {**self.changes, **changes})
        if "logging_steps" not in self.arguments.given and "logging_steps" not in changes:
            arguments.logging_steps = LOG_SHARE
        if "logging_first_step" not in self.arguments.given and "logging_first_step" not in changes:
            arguments.logging_first_step = True
        if "include_num_input_tokens_seen" not in self.arguments.given:
            arguments.include_num_input_tokens_seen = "all"
        if arguments.activation_checkpointing:
            # The reentrant kind needs inputs that require gradients, which a frozen embedding's are not.
            given = arguments.activation_checkpointing_kwargs
            arguments.activation_checkpointing_kwargs = {"use_reentrant": False, **(given or {})}
        if world_size() > 1 and arguments.ddp_find_unused_parameters is None:
            arguments.ddp_find_unused_parameters = False
        return arguments

    def over(self, train: Any, held_out: Any) -> "Job":
        """Return the same job over other rows."""
        return dataclasses.replace(self, changes=dict(self.changes), rows=(train, held_out))

    def trainer(
        self,
        policy: RankPolicy | None = None,
        changes: Mapping[str, Any] | None = None,
        *,
        on_divergence: str | None = None,
        guard: str | None = None,
    ) -> LoraTrainer:
        """Return a trainer over the job's model. ``policy`` is the run's own unless given.

        ``changes`` are fields of TrainingArguments for this trainer alone.
        """
        prepared = self.prepared
        args = self.training_arguments(**(changes or {}))
        held_out = None if prepared.held_out is None else prepared.held_out.dataset
        rows, eval_rows = self.rows or (prepared.train.dataset, held_out)
        pad = prepared.base.tokenizer.pad_token_id
        assert isinstance(pad, int), "the base's loader gives every tokenizer a pad token"
        trainer = LoraTrainer(
            prepared.model,
            args,
            policy or prepared.policy,
            LoopSettings(
                on_divergence or self.arguments.run.on_divergence,
                self.arguments.lora.loraplus_lr_ratio,
                guard or self.arguments.run.guard,
            ),
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=Collator(pad, None if args.use_cpu else PAD_MULTIPLE, prepared.lora.invocation),
            processing_class=prepared.base.tokenizer,
        )
        for watcher in self.watchers:
            trainer.add_callback(watcher)
        return trainer


def _copy(training: TrainingArguments, changes: Mapping[str, Any]) -> TrainingArguments:
    """Return a copy. dataclasses.replace would run transformers' checks on values that they have rewritten."""
    known = {each.name for each in dataclasses.fields(training)}
    assert changes.keys() <= known, f"no training arguments: {sorted(changes.keys() - known)}"
    found = copy.copy(training)
    for name, value in changes.items():
        setattr(found, name, value)
    return found
