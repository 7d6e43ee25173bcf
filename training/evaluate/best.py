"""Which evaluation was the best, where the score is a share of right answers and two are often equal.

transformers keeps the first of equals. Early in a run every share is 0, and the checkpoint of the first evaluation
would be kept as the best of them all; among equals, here the lower eval loss wins.
"""

from collections.abc import Mapping
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

LOSS = "eval_loss"


def is_better(
    args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float], by_more_than: float = 0.0
) -> bool:
    """Return whether ``metrics`` are better than those of the best evaluation so far, by metric_for_best_model and, if
    that is equal, by eval loss. False where the metric is missing."""
    name = str(args.metric_for_best_model)
    value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
    if value is None:
        return False
    if state.best_metric is None:
        return True
    if value != state.best_metric:
        gain = value - state.best_metric if args.greater_is_better else state.best_metric - value
        return bool(gain > by_more_than)
    loss, best = metrics.get(LOSS), _loss_at(state, state.best_global_step)
    return loss is not None and best is not None and loss < best


def _loss_at(state: TrainerState, step: int | None) -> float | None:
    losses = (entry[LOSS] for entry in state.log_history if LOSS in entry and entry.get("step") == step)
    return next(losses, None)


class BestCheckpoint(Trainer):
    """The part of a trainer that decides which checkpoint is the best."""

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Say whether the checkpoint about to be written is the best so far, and remember it."""
        wins_tie = (
            self.args.metric_for_best_model is not None
            and self.state.best_global_step is not None
            and is_better(self.args, self.state, metrics)
        )
        found: bool = super()._determine_best_metric(metrics, trial)
        if found or not wins_tie:
            return found
        self.state.best_global_step = self.state.global_step
        return True


class EarlyStopping(EarlyStoppingCallback):
    """Stops after ``early_stopping_patience`` evaluations in a row that were not better, counted on across a resumed
    run. What is better by no more than ``early_stopping_threshold`` doesn't count."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on counting where the checkpoint's run was."""
        super().on_train_begin(args, state, control, **kwargs)
        # A run that didn't count may be resumed by one that does.
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Count, and stop when patience is at its end."""
        self.early_stopping_patience_counter += 1
        if is_better(args, state, metrics, self.early_stopping_threshold or 0.0):
            self.early_stopping_patience_counter = 0
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
