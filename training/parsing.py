"""From words to Arguments: flags, a YAML file, old names, and what this machine can't do. Nothing is loaded here."""

import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser

from manylora.training.arguments import (
    ARGUMENT_CLASSES,
    Arguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    TrainingArguments,
)
from manylora.training.distributed import settle_configs
from manylora.training.errors import InvalidArgument
from manylora.training.old_flags import flag_name, modernise

AUTO = "auto"


class _Parser(HfArgumentParser):
    """An argument parser whose errors are exceptions."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage and leaving."""
        raise InvalidArgument(message.replace("argument --", "--", 1))


def make_parser() -> _Parser:
    """Return the parser of all flags; prefixes of flags are not taken for them."""
    return _Parser(
        list(ARGUMENT_CLASSES),
        prog="manylora train",
        allow_abbrev=False,
        description="Train a LoRA adapter. Takes the flags of Qwen's finetune.py, and every TrainingArguments flag"
        " of transformers. A first word without dashes is a YAML file with the same keys.",
    )


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the flags of a run. Raises InvalidArgument, naming the flag and what it takes."""
    words, notes = modernise(_with_file(argv))
    words, more = settle_configs(words)
    words, auto = _take_auto(words)
    words, fallback = _settle_device(words)
    parsed = _parse(make_parser(), words)
    given = frozenset(name for name in map(flag_name, words) if name)
    arguments = Arguments(*parsed, auto, given, (*notes, *more, *fallback), tuple(argv))
    check(arguments)
    return arguments


def _parse(
    parser: _Parser, words: Sequence[str]
) -> tuple[ModelArguments, DataArguments, LoraArguments, RunArguments, TrainingArguments]:
    try:
        with warnings.catch_warnings():
            # transformers announces new names for flags that this command keeps taking by both.
            warnings.simplefilter("ignore", FutureWarning)
            *parsed, unknown = parser.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
    except (ValueError, ImportError, TypeError) as error:
        raise InvalidArgument(str(error).strip().splitlines()[0]) from None
    if unknown:
        raise InvalidArgument(_unknown(parser, unknown[0]))
    model, data, lora, run, training = parsed
    return model, data, lora, run, training


def _unknown(parser: _Parser, word: str) -> str:
    names = [option for option in parser._option_string_actions if "-" not in option[2:]]
    close = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `manylora train --help` lists all"
    return f"{word} is no flag of manylora train{hint}"


def _with_file(argv: Sequence[str]) -> list[str]:
    """Put the keys of the YAML file before the flags, which then win."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words = ["--config", *words]
    for position, word in enumerate(words):
        if word == "--config" and position + 1 < len(words):
            path = words[position + 1]
            rest = words[:position] + words[position + 2 :]
            return [*_words_of_file(Path(path)), "--config", path, *rest]
        if word.startswith("--config="):
            return _with_file([*words[:position], "--config", word.split("=", 1)[1], *words[position + 1 :]])
    return words


def _words_of_file(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"--config {path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InvalidArgument(f"--config {path}: expected keys and values, as in `learning_rate: 3e-4`")
    return words_of({key: value for key, value in content.items() if value is not None})


def words_of(keys: Mapping[Any, Any]) -> list[str]:
    """Return the keys and values of a YAML file as flags."""
    words: list[str] = []
    for key, value in keys.items():
        words.append(f"--{key}")
        if isinstance(value, bool):
            words.append(_word_of(str(key).replace("-", "_"), value))
        elif isinstance(value, list):
            words += map(str, value)
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def _word_of(key: str, value: bool) -> str:
    """Return a truth value as the word that was written: YAML reads off, on and no as truth values too."""
    fields = (field for part in ARGUMENT_CLASSES for field in dataclasses.fields(part) if field.name == key)
    choices = next((field.metadata.get("choices", ()) for field in fields), ())
    if key.endswith("_strategy"):
        choices = ("no",)
    return next((word for word in (("on", "yes") if value else ("off", "no")) if word in choices), str(value))


def _take_auto(words: Sequence[str]) -> tuple[list[str], bool]:
    """Keep the last --learning_rate alone; take it out too if it is "auto"."""
    places = [position for position, word in enumerate(words) if flag_name(word) == "learning_rate"]
    auto = bool(places) and list(words[places[-1] + 1 : places[-1] + 2]) == [AUTO]
    dropped = {place + shift for place in (places if auto else places[:-1]) for shift in (0, 1)}
    return [word for position, word in enumerate(words) if position not in dropped], auto


def _settle_device(words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Without a GPU say so to transformers, and use bf16 for fp16, which has no kernels to train with on a CPU."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return list(words), ()
    found = [*words, "--use_cpu", "True"]
    for position, word in enumerate(found):
        if flag_name(word) == "fp16" and found[position + 1].lower() not in ("false", "0", "no"):
            found[position] = "--bf16"
            return found, ("--fp16: a CPU does not train in fp16; bf16 is used, which has the same size",)
    return found, ()


def check(arguments: Arguments) -> None:
    """Refuse what can't be run, before anything is loaded. Raises InvalidArgument."""
    lora, training, run = arguments.lora, arguments.training, arguments.run
    if run.tasks is None and not (training.use_lora or lora.q_lora):
        raise InvalidArgument("manylora trains adapters: add --use_lora, or --q_lora for a base in 4 bits")
    if run.tasks is None and not arguments.data.data_path:
        raise InvalidArgument("--data_path is missing: the JSON, JSONL, CSV or Parquet file to train on")
    if run.tasks is None and "output_dir" not in arguments.given:
        raise InvalidArgument("--output_dir is missing: the directory for the adapter")
    if lora.lora_r < 1:
        raise InvalidArgument(f"--lora_r {lora.lora_r}: a rank is an integer from 1 up")
    for name, value in (("lora_dropout", lora.lora_dropout), ("eval_share", arguments.data.eval_share)):
        if not 0 <= value < 1:
            raise InvalidArgument(f"--{name} {value}: expected a number from 0 up to, but not, 1")
    if not (math.isfinite(lora.lora_alpha) and lora.lora_alpha > 0):
        raise InvalidArgument(f"--lora_alpha {lora.lora_alpha}: expected a number above 0")
    if not training.learning_rate > 0:
        raise InvalidArgument(f"--learning_rate {training.learning_rate}: expected a number above 0, or auto")
    if training.model_max_length < 2:
        raise InvalidArgument(f"--model_max_length {training.model_max_length}: expected at least 2 tokens")
    _check_pairs(arguments)


def _check_pairs(arguments: Arguments) -> None:
    run, data = arguments.run, arguments.data
    if arguments.lora.double_quant and not arguments.lora.q_lora:
        raise InvalidArgument("--double_quant is about the NF4 scales of --q_lora: add that, or leave it out")
    if run.resume and arguments.adapter_start:
        raise InvalidArgument(
            "--resume goes on with this run's last checkpoint, --from_adapter starts a new run: give one of them"
        )
    if run.resume and run.overwrite_output_dir:
        raise InvalidArgument("--resume needs what --overwrite_output_dir would remove: give one of them")
    held_out = bool(data.eval_data_path) or data.eval_share > 0
    if not held_out and (run.early_stopping_patience or run.eval_answers != "none"):
        raise InvalidArgument("evaluation needs data: give --eval_data_path FILE, or --eval_share 0.05")
    if run.tasks is None and run.early_stopping_patience and arguments.training.eval_strategy == "no":
        raise InvalidArgument("--early_stopping_patience needs --eval_strategy steps or epoch")
    if arguments.lora.rank_schedule and (arguments.training.fsdp or arguments.training.deepspeed):
        raise InvalidArgument(
            "--rank_schedule changes the trained parameters between steps, which --fsdp and --deepspeed have sharded by"
            " then: leave one of them out"
        )
