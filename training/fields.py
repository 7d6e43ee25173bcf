"""What becomes of transformers' TrainingArguments here: those that have no effect are refused with the reason.

All others are honoured, by transformers or by this loop. A flag that is taken and does nothing is the worst of answers.
What would fail hours later, or in a traceback, is built once here, small and without a model.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments, get_scheduler

from manylora.training.errors import InvalidArgument

_EVAL = "evaluation keeps no predictions, only each token's loss"
_COMPILED = "the head runs at trained positions alone, whose number differs from batch to batch: code would be compiled"
_FULL = "it works on the gradients of whole weights, and an adapter's factors are small already"
REFUSED: Mapping[str, str] = {
    "optim_target_modules": _FULL,
    "bf16_full_eval": "evaluation runs in the type of training: give --bf16",
    "fp16_full_eval": "evaluation runs in the type of training: give --fp16",
    "torch_compile": f"{_COMPILED} anew for each",
    "torch_compile_backend": f"{_COMPILED} anew for each",
    "torch_compile_mode": f"{_COMPILED} anew for each",
    "use_cache": "a cache of keys is of no use where all tokens are there at once",
    "auto_find_batch_size": "a batch that doesn't fit is split, with the same result; --auto_fit settles it before",
    "eval_do_concat_batches": _EVAL,
    "eval_use_gather_object": _EVAL,
    "eval_accumulation_steps": _EVAL,
    "include_for_metrics": f"{_EVAL}; --eval_answers judges answers",
    "batch_eval_metrics": f"{_EVAL}; --eval_answers judges answers",
    "save_on_each_node": "the first process writes the output directory, the others read it",
    "enable_jit_checkpoint": "SIGTERM ends a run with a checkpoint without it",
    "restore_callback_states_from_checkpoint": "what has a state here goes on by itself when a run is resumed",
    "parallelism_config": "tensor and context parallelism are not for adapters here; --fsdp and --deepspeed shard",
    "label_names": "labels are made from the data: the assistant's tokens",
    "length_column_name": "lengths are those of the tokenised rows",
    "do_predict": "this command trains; `manylora serve` answers",
}
"""Flags that would have no effect, and why; refused with any value but the default."""

NEEDS: Mapping[str, tuple[str, Callable[[TrainingArguments], bool]]] = {
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        ("--push_to_hub", lambda training: bool(training.push_to_hub)),
    ),
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ("--report_to trackio", lambda training: "trackio" in training.report_to),
    ),
    "liger_kernel_config": ("--use_liger_kernel", lambda training: bool(training.use_liger_kernel)),
}
"""Flags that say how another is done, and that other."""

SAMPLERS = ("random", "sequential", "group_by_length")
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


def check_steps(name: str, value: float) -> None:
    """Refuse what is neither steps nor a share of the run. Raises InvalidArgument."""
    if not 0 < value < float("inf") or (value > 1 and value != int(value)):
        raise InvalidArgument(f"--{name} {value:g}: expected steps from 1 up, or a share of the run below 1")


def check_fields(training: TrainingArguments, given: frozenset[str]) -> None:
    """Refuse what was ``given`` and would have no effect, or would fail later. Raises InvalidArgument."""
    for name in sorted(given & REFUSED.keys()):
        if getattr(training, name) != default_of(name):
            raise InvalidArgument(f"--{name}: {REFUSED[name]}; leave it out")
    for name in sorted(given & NEEDS.keys()):
        other, is_on = NEEDS[name]
        if not is_on(training):
            raise InvalidArgument(f"--{name} has no effect without {other}")
    _check_numbers(training, given)
    _check_words(training, given)
    _check_optimizer(training, given)
    _check_schedule(training)
    _check_loader(training)


def default_of(name: str) -> Any:
    """Return the default of one of transformers' arguments."""
    field = TrainingArguments.__dataclass_fields__[name]
    return field.default_factory() if callable(field.default_factory) else field.default


def _check_numbers(training: TrainingArguments, given: frozenset[str]) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training, name) < 1:
            raise InvalidArgument(f"--{name} {getattr(training, name)}: expected a number from 1 up")
    if training.max_steps < 1 and "max_steps" in given and training.max_steps != -1:
        raise InvalidArgument(
            f"--max_steps {training.max_steps}: expected a number from 1 up, or -1 for --num_train_epochs"
        )
    if training.max_steps < 1 and not training.num_train_epochs > 0:
        raise InvalidArgument(f"--num_train_epochs {training.num_train_epochs:g}: expected a number above 0")
    for name in ("max_grad_norm", "weight_decay", "adam_epsilon", "neftune_noise_alpha"):
        value = getattr(training, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InvalidArgument(f"--{name} {value:g}: expected a number from 0 up")
    if training.save_total_limit is not None and training.save_total_limit < 1:
        raise InvalidArgument(
            f"--save_total_limit {training.save_total_limit}: expected a number from 1 up; without it all are kept"
        )
    if not 0 <= training.label_smoothing_factor < 1:
        raise InvalidArgument(
            f"--label_smoothing_factor {training.label_smoothing_factor:g}: expected a number from 0 up to, but not, 1"
        )
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(training, name) or 0) < 2**32:
            raise InvalidArgument(
                f"--{name} {getattr(training, name)}: expected a number from 0 up, below 2^32"
            )


def _check_words(training: TrainingArguments, given: frozenset[str]) -> None:
    if training.train_sampling_strategy not in SAMPLERS:
        raise InvalidArgument(
            f"--train_sampling_strategy {training.train_sampling_strategy}: expected {', '.join(SAMPLERS)}"
        )
    for name in ("do_train", "do_eval"):
        if name in given and not getattr(training, name):
            raise InvalidArgument(
                f"--{name} false: this command trains, and evaluates where data is held out"
            )
    if "local_rank" in given and str(training.local_rank) != os.environ.get("LOCAL_RANK", "-1"):
        raise InvalidArgument("--local_rank: torchrun and accelerate say it in the environment; leave it out")
    if getattr(training.accelerator_config, "split_batches", False):
        raise InvalidArgument(
            "--accelerator_config: split_batches would change the batch that is planned for"
        )
    if any("tpu" in str(getattr(each, "value", each)) for each in training.debug):
        raise InvalidArgument("--debug tpu_metrics_debug: there is no training on TPUs here")
    if training.use_liger_kernel:
        from transformers.utils import is_liger_kernel_available

        if not is_liger_kernel_available():
            raise InvalidArgument("--use_liger_kernel needs a package: pip install liger-kernel")
    _tried("--log_level", training.get_process_log_level)


def _check_optimizer(training: TrainingArguments, given: frozenset[str]) -> None:
    """Make the optimiser over one small matrix, and see what it reads of what was given."""
    name = str(getattr(training.optim, "value", training.optim))
    asked = _Asked(_pairs(training.optim_args))
    if name.startswith(("galore", "apollo")) or "lomo" in name:
        raise InvalidArgument(f"--optim {name}: {_FULL}; take adamw_torch")
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext

    betas = (training.adam_beta1, training.adam_beta2)
    context = OptimizerContext(
        args=training,
        model=None,
        optimizer_kwargs={"lr": training.learning_rate},
        adam_kwargs={"betas": betas, "eps": training.adam_epsilon},
        optim_args=asked,
    )
    kind, options = _tried(f"--optim {name}", lambda: _OPTIMIZER_HANDLERS[training.optim](context))
    unread = sorted(asked.keys() - asked.read) + (["weight_decay"] if "weight_decay" in asked else [])
    if unread:
        raise InvalidArgument(f"--optim_args: --optim {name} has no {unread[0]} that is read from there")
    for option, flags in (("betas", ("adam_beta1", "adam_beta2")), ("eps", ("adam_epsilon",))):
        without = [flag for flag in flags if flag in given and option not in options]
        if without:
            raise InvalidArgument(f"--{without[0]}: --optim {name} has no such setting")
    _tried(f"--optim {name}", lambda: kind([nn.Parameter(torch.zeros(2, 2))], **options))


class _Asked(dict[str, str]):
    """optim_args that remember which of them an optimiser reads."""

    def __init__(self, pairs: Mapping[str, str]) -> None:
        super().__init__(pairs)
        self.read: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> str:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().get(key, *default)


def _pairs(text: str | None) -> dict[str, str]:
    found = {}
    for part in (text or "").replace(" ", "").split(","):
        key, equals, value = part.partition("=")
        if part and not (key and equals and value):
            raise InvalidArgument(f"--optim_args {text}: expected NAME=VALUE,… as in momentum=0.9")
        if part:
            found[key] = value
    return found


def _check_schedule(training: TrainingArguments) -> None:
    """Make the schedule over one parameter."""
    name = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    options = training.lr_scheduler_kwargs
    if options is not None and not isinstance(options, dict):
        raise InvalidArgument(f"--lr_scheduler_kwargs {options}: expected JSON, as in '{{\"min_lr\": 1e-5}}'")
    if name in WITHOUT_WARMUP and training.warmup_steps:
        instead = "constant_with_warmup has one" if name == "constant" else "leave --warmup_steps out"
        raise InvalidArgument(f"--lr_scheduler_type {name} has no warm-up: {instead}")
    if name.startswith("constant") and options:
        raise InvalidArgument(f"--lr_scheduler_kwargs: --lr_scheduler_type {name} takes none")
    _tried(
        f"--lr_scheduler_type {name} with --lr_scheduler_kwargs {options or 'none'}",
        lambda: get_scheduler(
            name,
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate),
            num_warmup_steps=training.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=options,
        ),
    )


def _check_loader(training: TrainingArguments) -> None:
    """Make a loader, which starts no workers before it is read from."""
    options = {
        name: getattr(training, f"dataloader_{name}")
        for name in (
            "num_workers",
            "pin_memory",
            "persistent_workers",
            "prefetch_factor",
            "multiprocessing_context",
            "in_order",
        )
    }
    _tried("--dataloader_…", lambda: DataLoader(TensorDataset(torch.zeros(1)), **options))


def _tried(what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError, KeyError, ImportError, RuntimeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidArgument(f"{what}: {first}") from None
