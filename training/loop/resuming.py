"""What a resumed run takes from its own flags and not from the checkpoint: how far it goes, when it logs and saves.

transformers takes the checkpoint's, and begins with the learning rate of a schedule that may have ended there.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from manylora.training.loop.trainer import LoraTrainer


class GoesOn(TrainerCallback):
    """Settles a run's state when it begins, which for a run that isn't resumed changes nothing."""

    def __init__(self, trainer: "LoraTrainer") -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Take steps between logs and checkpoints from the flags, the rate from the schedule, and find the best."""
        if not state.global_step:
            return
        state.compute_steps(args, state.max_steps)
        settle_rates(self._trainer.lr_scheduler)
        if state.best_global_step is not None and not state.best_model_checkpoint:
            self._find_best(args, state)

    def _find_best(self, args: TrainingArguments, state: TrainerState) -> None:
        """Find the best checkpoint where the run's directory is now, or go on without one."""
        name = f"checkpoint-{state.best_global_step}"
        resumed = self._trainer.resumed_from
        places = [Path(str(args.output_dir)), *([] if resumed is None else [resumed.parent])]
        found = next((place / name for place in places if (place / name).is_dir()), None)
        if found is not None:
            state.best_model_checkpoint = str(found)
        elif args.metric_for_best_model is not None and state.best_metric is not None:
            # Else nothing that is still to come would be kept but what beats a checkpoint that nobody has.
            state.best_metric = state.best_global_step = None
            self._trainer.events.say(
                state.global_step,
                "note",
                f"{name}, the best so far, is gone: the best of what is still to come is kept",
            )


def settle_rates(scheduler: Any) -> None:
    """Give the optimiser the rates that the schedule has for the step to come.

    Where they are the checkpoint's already, they stay to the bit.
    """
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate may have wrapped it
    if not isinstance(inner, LambdaLR):
        return
    rates = [
        base * schedule(inner.last_epoch)
        for base, schedule in zip(inner.base_lrs, inner.lr_lambdas, strict=True)
    ]
    for position, (group, rate) in enumerate(zip(inner.optimizer.param_groups, rates, strict=True)):
        if math.isclose(float(group["lr"]), rate, rel_tol=1e-6):
            continue
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        inner._last_lr[position] = rate
