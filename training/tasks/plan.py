"""tasks.yaml: a file of `manylora train`'s own keys, which all tasks share, and under ``tasks`` each task's."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.names import check_name, list_names
from manylora.training.arguments import ARGUMENT_CLASSES, Arguments, TrainingArguments
from manylora.training.distributed import world_size
from manylora.training.errors import InvalidArgument
from manylora.training.fields import default_of
from manylora.training.flags import read_flags, words_of_flags
from manylora.training.job import LOG_SHARE
from manylora.training.output import RUN_FILES
from manylora.training.parsing import name_file, parse_arguments, words_of
from manylora.training.yaml_file import read_keys

OF_A_TASK = frozenset(
    (
        # data
        "data_path",
        "eval_data_path",
        "eval_share",
        "data_format",
        "columns",
        "lazy_preprocess",
        "packing",
        "model_max_length",
        # adapter
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "use_rslora",
        "init_lora_weights",
        "loraplus_lr_ratio",
        "rank_schedule",
        "adapter_name",
        "description",
        "route_examples",
        # schedule
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "warmup_ratio",
        "num_train_epochs",
        "max_steps",
        # batch
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "dataloader_drop_last",
        # optimiser
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "optim",
        "optim_args",
        "label_smoothing_factor",
        # run
        "seed",
        "data_seed",
        "train_sampling_strategy",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "guard",
        "on_divergence",
    )
)
"""The keys that may differ from task to task. All others belong to the base or to the run."""

SIDE_BY_SIDE = OF_A_TASK | {
    "output_dir",
    "use_lora",
    "use_cpu",
    "bf16",
    "activation_checkpointing",
    "gradient_checkpointing",
    "report_to",
    "run_name",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_strategy",
    "logging_first_step",
    "log_level",
    "disable_tqdm",
    "do_train",
    "do_eval",
    "prediction_loss_only",
    "remove_unused_columns",
}
"""Of transformers' arguments, those that several adapters side by side honour; with others they are trained alone."""


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter to be: its name, and the arguments that training it alone would have."""

    name: str
    arguments: Arguments

    @property
    def directory(self) -> Path:
        """Where its adapter goes."""
        return Path(str(self.arguments.training.output_dir))

    @property
    def training(self) -> TrainingArguments:
        """Transformers' part of the arguments."""
        return self.arguments.training


@dataclass(frozen=True, slots=True)
class Plan:
    """What a file of tasks asks for."""

    arguments: Arguments
    """Of the run as a whole: the base, the output directory, how often checkpoints are written."""
    tasks: tuple[Task, ...]


def read_tasks(arguments: Arguments) -> Plan:
    """Read the file that ``--tasks`` names. A task's own keys win over flags, flags over the keys all tasks share.

    Raises InvalidArgument naming file, task and key.
    """
    path = Path(str(arguments.run.tasks))
    content = read_keys(path, "--tasks")
    tasks = content.pop("tasks", None)
    if not isinstance(tasks, dict) or not tasks:
        raise InvalidArgument(
            f"--tasks {path}: `tasks` is missing: names, each with data_path and what else it needs"
        )
    words = [
        *_words(content, f"--tasks {path}"),
        *words_of_flags(name_file(read_flags(arguments.command))),
    ]
    of_run = _parsed(words, f"--tasks {path}")
    if "output_dir" not in of_run.given:
        raise InvalidArgument(
            f"--tasks {path}: output_dir is missing: the directory for the adapters' directories"
        )
    directory = Path(str(of_run.training.output_dir))
    found: list[Task] = []
    for name, keys in tasks.items():
        where = f"--tasks {path}: task {name}"
        own = _own_words(name, keys, where)
        alone = [
            "--use_lora",
            "True",
            *_without_tasks(words),
            *own,
            "--output_dir",
            str(directory / str(name)),
        ]
        parsed = _parsed(alone, where)
        _check(parsed, where)
        if "logging_steps" not in parsed.given:
            parsed.training.logging_steps = LOG_SHARE
        if "logging_first_step" not in parsed.given:
            parsed.training.logging_first_step = True
        found.append(Task(str(name), parsed))
    _check_folders(found, path)
    return Plan(of_run, tuple(found))


def _without_tasks(words: Sequence[str]) -> list[str]:
    """Return the flags without ``--tasks FILE``: what is left, with a task's own, trains that task alone."""
    return words_of_flags(flag for flag in read_flags(words) if flag.name != "tasks")


def _parsed(words: list[str], where: str) -> Arguments:
    try:
        return parse_arguments(words)
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error}") from None


def _own_words(name: object, keys: object, where: str) -> list[str]:
    try:
        check_name(str(name))
    except InvalidAdapter as error:
        raise InvalidArgument(f"{where}: {error}") from None
    if not isinstance(keys, dict):
        raise InvalidArgument(f"{where}: expected keys and values, as in `data_path: sql.jsonl`")
    for key in map(str, keys):
        if key in OF_A_TASK:
            continue
        if any(key == each.name for part in ARGUMENT_CLASSES for each in fields(part)):
            raise InvalidArgument(f"{where}: {key} is the same for all tasks: put it beside `tasks`")
        close = difflib.get_close_matches(key, OF_A_TASK, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InvalidArgument(f"{where}: {key} is no key of a task{hint}")
    return _words(keys, where)


def _words(keys: Mapping[Any, Any], where: str) -> list[str]:
    """Return keys and values as flags."""
    empty = next((key for key, value in keys.items() if value is None), None)
    if empty is not None:
        raise InvalidArgument(f"{where}: {empty} has no value")
    return words_of(keys)


def _check(arguments: Arguments, where: str) -> None:
    """Refuse what a task can't be trained with beside others."""
    if not arguments.data.data_path:
        raise InvalidArgument(
            f"{where}: data_path is missing: the JSON, JSONL, CSV or Parquet file to train on"
        )
    for what, given in {**_only_alone(arguments), **_of_one_loop(arguments)}.items():
        if given:
            raise InvalidArgument(
                f"{where}: {what} doesn't go with --tasks; train this adapter alone, or leave it out"
            )
    if world_size() > 1:
        raise InvalidArgument(
            "--tasks runs in one process: give each process tasks of its own, and one device"
        )


def _only_alone(arguments: Arguments) -> dict[str, bool]:
    """Return what one adapter can be trained with and several side by side can't, and whether it was asked for."""
    lora, training, run = arguments.lora, arguments.training, arguments.run
    return {
        "learning_rate auto": arguments.learning_rate_auto,
        "use_dora": lora.use_dora,
        "alora_invocation_string": lora.alora_invocation_string is not None,
        "alora_invocation_tokens": bool(lora.alora_invocation_tokens),
        "modules_to_save": bool(lora.modules_to_save),
        f"lora_bias {lora.lora_bias}": lora.lora_bias != "none",
        f"rank_schedule {lora.rank_schedule}": (lora.rank_schedule or "").startswith("adalora"),
        f"train_sampling_strategy {training.train_sampling_strategy}": str(training.train_sampling_strategy)
        not in ("random", "sequential"),
        "neftune_noise_alpha": training.neftune_noise_alpha is not None,
        "from_adapter": arguments.adapter_start is not None,
        "resume_from_checkpoint DIR": training.resume_from_checkpoint is not None,
        "auto_fit": run.auto_fit,
        "early_stopping_patience": run.early_stopping_patience > 0,
        "load_best_model_at_end": training.load_best_model_at_end,
        f"eval_answers {run.eval_answers}": run.eval_answers != "none",
        "fp16 (take bf16)": training.fp16,
        "eval_on_start": training.eval_on_start,
        "eval_delay": bool(training.eval_delay),
        "torch_compile": training.torch_compile,
        "use_liger_kernel": training.use_liger_kernel,
        "push_to_hub": training.push_to_hub,
        "deepspeed": training.deepspeed is not None,
        "fsdp": bool(training.fsdp),
    }


def _of_one_loop(arguments: Arguments) -> dict[str, bool]:
    """Return transformers' arguments that only the loop of one adapter knows, and whether they say anything."""
    training = arguments.training
    names = {each.name for each in fields(TrainingArguments)} & arguments.given - SIDE_BY_SIDE
    found = {name: getattr(training, name) != default_of(name) for name in sorted(names)}
    if training.activation_checkpointing_kwargs == {"use_reentrant": False}:
        found["activation_checkpointing_kwargs"] = found["gradient_checkpointing_kwargs"] = False
    scheduler, strategy = str(training.lr_scheduler_type.value), str(training.save_strategy.value)
    found[f"lr_scheduler_type {scheduler}"] = scheduler in ("reduce_lr_on_plateau", "greedy")
    found[f"save_strategy {strategy}"] = strategy == "best"
    return found


def _check_folders(tasks: list[Task], path: Path) -> None:
    """Refuse a task whose directory would lie in another's, as a name may have slashes, or be what a run writes."""
    for task in tasks:
        first = task.name.split("/")[0]
        if first in RUN_FILES or first.startswith((".", "checkpoint-")):
            raise InvalidArgument(
                f"--tasks {path}: a task can't be called {task.name}: the run writes {first} into its directory itself"
            )
        if any(other is not task and other.directory in task.directory.parents for other in tasks):
            names = list_names(each.name for each in tasks)
            raise InvalidArgument(
                f"--tasks {path}: {task.name} would lie within another task's directory ({names})"
            )
