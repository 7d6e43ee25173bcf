"""The parser of `manylora train`: every flag under one name, and a help that begins with what a run needs."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from manylora.training.arguments import ARGUMENT_CLASSES, TrainingArguments
from manylora.training.errors import InvalidArgument
from manylora.training.fields import REFUSED

USAGE = (
    "manylora train [RUN.yaml] --model_name_or_path BASE --data_path FILE --output_dir DIR --use_lora [FLAGS]"
)
DESCRIPTION = (
    "Train a LoRA adapter. Takes the flags of Qwen's finetune.py, and transformers' TrainingArguments. A first word"
    " without dashes is a YAML file with the same keys. `manylora train sweep --help` shows the search over rates and"
    " ranks."
)
COMMON = (
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "model_max_length",
    "use_lora",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "seed",
    "deepspeed",
    "fsdp",
)
"""Of transformers' flags, those that --help has too; all others are in --help-all."""
HELP = {
    "learning_rate": "The highest rate; auto looks for one on the data before the run.",
    "output_dir": "Where the adapter, its checkpoints and its report go.",
    "gradient_checkpointing": "Compute activations twice instead of keeping them.",
}
"""In place of transformers' own text."""
WIDTH, FLAG_WIDTH = 110, 38


LONGEST_ERROR = 400
"""Characters."""


class RunParser(HfArgumentParser):
    """A parser whose errors are exceptions, with one name for a flag and switches that need no value."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage and leaving."""
        if len(message) > LONGEST_ERROR:  # it has the value in it, which may be a whole file
            message = f"{message[:LONGEST_ERROR]} …"
        raise InvalidArgument(message.replace("argument --", "--", 1))

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: "dataclasses.Field[Any]") -> None:
        before = len(parser._actions)
        HfArgumentParser._parse_dataclass_field(parser, field)
        for action in parser._actions[before:]:
            _settle(action, parser)


def _settle(action: argparse.Action, parser: Any) -> None:
    """Leave an option its name with underscores, and let it take what transformers' own type forgets."""
    for spare in action.option_strings[1:]:
        del parser._option_string_actions[spare]
    action.option_strings = action.option_strings[:1]
    if action.type is string_to_bool and action.nargs is None:
        action.nargs, action.const = "?", True
    if action.dest == "include_num_input_tokens_seen":
        action.type, action.nargs = _tokens_seen, "?"
    if action.dest == "liger_kernel_config":
        action.type = json.loads
    if action.dest == "report_to":
        action.nargs = "+"


def _tokens_seen(word: str) -> str:
    if word in ("all", "non_padding", "no"):
        return word
    return "all" if string_to_bool(word) else "no"


class _Formatter(argparse.HelpFormatter):
    """Shows the kind of a value, and a default where it says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=FLAG_WIDTH, width=WIDTH)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kinds: dict[Any, str] = {int: "N", float: "X", string_to_bool: "BOOL"}
        return kinds.get(action.type, "TEXT")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = getattr(action.default, "value", action.default)
        if shown in (None, "", False) or shown == [] or action.nargs == 0:
            return text
        words = " ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
        return f"{text} Default: {words}".replace("%%", "%").replace("%", "%%")


def make_parser(*, everything: bool = False) -> RunParser:
    """Return the parser of all flags; prefixes of flags are not taken for them.

    Its help leaves out what is refused, and, unless ``everything`` is asked for, what few runs need.
    """
    parser = RunParser(
        list(ARGUMENT_CLASSES),
        prog="manylora train",
        usage=USAGE,
        allow_abbrev=False,
        add_help=False,
        formatter_class=_Formatter,
        description=DESCRIPTION,
        epilog=None if everything else "All of transformers' flags: manylora train --help-all",
    )
    own = {each.name for part in ARGUMENT_CLASSES if part is not TrainingArguments for each in _fields(part)}
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
        spare = action.dest in REFUSED or not (everything or action.dest in COMMON)
        # What has no value is --no_NAME, which --NAME false says too.
        if action.nargs == 0 or (action.dest not in own and spare):
            action.help = argparse.SUPPRESS
    return parser


def _fields(part: type) -> Sequence["dataclasses.Field[Any]"]:
    return dataclasses.fields(part)
