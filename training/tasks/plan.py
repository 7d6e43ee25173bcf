"""tasks.yaml: a file of `manylora train`'s own keys, which all tasks share, and under ``tasks`` each task's."""

import difflib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.names import check_name, list_names
from manylora.training.arguments import ARGUMENT_CLASSES, Arguments, TrainingArguments
from manylora.training.distributed import world_size
from manylora.training.errors import InvalidArgument
from manylora.training.job import LOG_SHARE
from manylora.training.parsing import parse_arguments, words_of

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


class _OneOfAKey(yaml.SafeLoader):
    """YAML without the right to give a key twice, of which plain YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice!r} is given twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def read_tasks(arguments: Arguments) -> Plan:
    """Read the file that ``--tasks`` names. A task's own keys win over flags, flags over the keys all tasks share.

    Raises InvalidArgument naming file, task and key.
    """
    path = Path(str(arguments.run.tasks))
    content = _read(path)
    tasks = content.pop("tasks", None)
    if not isinstance(tasks, dict) or not tasks:
        raise InvalidArgument(
            f"--tasks {path}: `tasks` is missing: names, each with data_path and what else it needs"
        )
    words = [*_words(content, f"--tasks {path}"), *arguments.command]
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
        parsed.training.logging_first_step = True
        found.append(Task(str(name), parsed))
    _check_folders(found, path)
    return Plan(of_run, tuple(found))


def _without_tasks(words: Sequence[str]) -> list[str]:
    """Return the flags without ``--tasks FILE``: what is left, with a task's own, trains that task alone."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--tasks":
            next(rest, None)
        elif not word.startswith("--tasks="):
            found.append(word)
    return found


def _parsed(words: list[str], where: str) -> Arguments:
    try:
        return parse_arguments(words)
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), _OneOfAKey)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"--tasks {path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InvalidArgument(f"--tasks {path}: expected keys and values, and among them `tasks`")
    return content


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
    training = arguments.training
    if not arguments.data.data_path:
        raise InvalidArgument(
            f"{where}: data_path is missing: the JSON, JSONL, CSV or Parquet file to train on"
        )
    held_out = bool(arguments.data.eval_data_path) or arguments.data.eval_share > 0
    if str(training.eval_strategy.value) != "no" and not held_out:
        raise InvalidArgument(f"{where}: eval_strategy needs eval_data_path, or eval_share 0.05")
    for what, given in _only_alone(arguments).items():
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
        "modules_to_save": bool(lora.modules_to_save),
        f"lora_bias {lora.lora_bias}": lora.lora_bias != "none",
        f"rank_schedule {lora.rank_schedule}": (lora.rank_schedule or "").startswith("adalora"),
        f"train_sampling_strategy {training.train_sampling_strategy}": str(training.train_sampling_strategy)
        not in ("random", "sequential"),
        "neftune_noise_alpha": training.neftune_noise_alpha is not None,
        "from_adapter": arguments.adapter_start is not None,
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


def _check_folders(tasks: list[Task], path: Path) -> None:
    """Refuse a task whose directory would lie in another's: a name may have slashes."""
    for task in tasks:
        if any(other is not task and other.directory in task.directory.parents for other in tasks):
            names = list_names(each.name for each in tasks)
            raise InvalidArgument(
                f"--tasks {path}: {task.name} would lie within another task's directory ({names})"
            )
