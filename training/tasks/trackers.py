"""--report_to for several tasks: one run at the tracking service, each task's numbers under its name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from manylora.training.report.trackers import check_report_to
from manylora.training.tasks.member import Member

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trackers:
    """transformers' own callbacks for TensorBoard, W&B and MLflow, told what a Trainer would tell them."""

    def __init__(self, args: TrainingArguments, model: "PreTrainedModel") -> None:
        self._args, self._model = args, model
        self._state, self._control = TrainerState(), TrainerControl()
        kinds = get_reporting_integration_callbacks(list(check_report_to(args.report_to)))
        self._callbacks: list[TrainerCallback] = [kind() for kind in kinds]

    def begin(self, rounds: int, total_rounds: int) -> None:
        """Open the run."""
        self._state.global_step, self._state.max_steps = rounds, total_rounds
        for each in self._callbacks:
            each.on_train_begin(self._args, self._state, self._control, model=self._model)

    def logged(self, member: Member, values: Mapping[str, float], rounds: int) -> None:
        """Hand on what a task logged, as TASK/loss or eval_TASK/loss."""
        self._state.global_step = rounds
        logs = {_name(member.name, key): value for key, value in values.items()}
        for each in self._callbacks:
            each.on_log(self._args, self._state, self._control, logs=logs, model=self._model)

    def end(self) -> None:
        """Close the run."""
        for each in self._callbacks:
            each.on_train_end(self._args, self._state, self._control, model=self._model)


def _name(task: str, key: str) -> str:
    return f"eval_{task}/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"{task}/{key}"
