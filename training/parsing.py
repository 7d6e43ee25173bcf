"""From words to Arguments: flags, a YAML file, old names, and what this machine can't do. Nothing is loaded here."""

import contextlib
import dataclasses
import difflib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from manylora.adapters.manifest import MAX_DESCRIPTION, MAX_EXAMPLES
from manylora.training.arguments import (
    Arguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    TrainingArguments,
)
from manylora.training.distributed import check_sharding, settle_configs, settle_processes
from manylora.training.errors import InvalidArgument
from manylora.training.evaluate.metrics import METRIC_NAMES
from manylora.training.fields import check_fields, check_steps
from manylora.training.flags import FALSE, TRUE, Flag, last_of, read_flags, words_of_flags
from manylora.training.old_flags import modernise
from manylora.training.parser import RunParser, make_parser
from manylora.training.rank.budget import PREFIX, AdaLoraBudget
from manylora.training.rank.schedule import RankSchedule
from manylora.training.yaml_file import read_keys

AUTO = "auto"


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the flags of a run. Raises InvalidArgument, naming the flag and what it takes."""
    flags, notes = modernise(_with_file(argv))
    flags, more = settle_configs(flags)
    flags, auto = _take_auto(flags)
    flags, fallback = _settle_device(_settle_resume(flags))
    _check_steps(flags)
    parsed = _parse(make_parser(), words_of_flags(flags))
    given = frozenset(flag.name for flag in flags if flag.name)
    processes = settle_processes(parsed[-1])
    arguments = Arguments(*parsed, auto, given, (*notes, *more, *fallback, *processes), tuple(argv))
    check(arguments)
    return dataclasses.replace(arguments, notes=(*arguments.notes, *_unused(arguments)))


def _unused(arguments: Arguments) -> list[str]:
    """Return sentences on flags of ours that another one leaves without effect."""
    run, data, lora, given = arguments.run, arguments.data, arguments.lora, arguments.given
    pairs = {
        "eval_share": (bool(data.eval_data_path), "--eval_data_path is held out, and no share of the data"),
        "lora_r": (lora.rank_schedule is not None, "--rank_schedule says the ranks"),
        "memory": (not run.auto_fit, "it is what --auto_fit makes the run fit into"),
        "admin_key": (run.register is None, "it is for the server of --register"),
    }
    return [
        f"--{name} is not used: {why}"
        for name, (is_unused, why) in pairs.items()
        if is_unused and name in given
    ]


def _parse(
    parser: RunParser, words: Sequence[str]
) -> tuple[ModelArguments, DataArguments, LoraArguments, RunArguments, TrainingArguments]:
    try:
        with warnings.catch_warnings():
            # transformers announces new names for flags that this command keeps taking by both.
            warnings.simplefilter("ignore", FutureWarning)
            *parsed, unknown = parser.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
    except json.JSONDecodeError as error:
        example = '{"min_lr": 1e-5}'
        raise InvalidArgument(f"{error.doc!r} isn't JSON: {error.msg}; expected as in '{example}'") from None
    except (ValueError, ImportError, TypeError, OSError) as error:
        raise InvalidArgument(_by_its_flag(" ".join(str(error).split()))) from None
    if unknown:
        raise InvalidArgument(_unknown(parser, unknown[0]))
    model, data, lora, run, training = parsed
    return model, data, lora, run, training


def _by_its_flag(sentence: str) -> str:
    """Return what transformers says of a value, by the flag that it was given by."""
    value, kind, known = sentence.partition(" is not a valid OptimizerNames, please select one of ")
    return f"--optim {value}: expected one of {known}" if kind else sentence


def _unknown(parser: RunParser, word: str) -> str:
    names = list(parser._option_string_actions)
    close = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else "; `manylora train --help` lists all"
    return f"{word} is no flag of manylora train{hint}"


def name_file(flags: Sequence[Flag]) -> list[Flag]:
    """Return ``flags`` with the file that a first word without dashes is, given by its flag."""
    if not flags or flags[0].name:
        return list(flags)
    first, *rest = flags[0].values
    return [Flag("config", (first,)), *([Flag("", tuple(rest))] if rest else []), *flags[1:]]


def _with_file(argv: Sequence[str]) -> list[Flag]:
    """Put the keys of the YAML file before the flags, which then win."""
    flags = name_file(read_flags(argv))
    files = [flag for flag in flags if flag.name == "config"]
    if not files:
        return flags
    if len(files) > 1:
        raise InvalidArgument("--config is given twice: give one YAML file, and flags for what differs")
    keys = read_keys(Path(files[0].value()), "--config")
    return [*flags_of({key: value for key, value in keys.items() if value is not None}), *flags]


def flags_of(keys: Mapping[Any, Any]) -> list[Flag]:
    """Return the keys and values of a YAML file as flags."""
    found: list[Flag] = []
    for key, value in keys.items():
        if isinstance(value, list):
            values = tuple(map(str, value))
        else:
            values = (json.dumps(value) if isinstance(value, dict) else str(value),)
        found.append(Flag(str(key).replace("-", "_"), values))
    return found


def words_of(keys: Mapping[Any, Any]) -> list[str]:
    """Return the keys and values of a YAML file as words of a command line."""
    return words_of_flags(flags_of(keys))


def _check_steps(flags: Sequence[Flag]) -> None:
    """Look at these before transformers does, which takes some for no flag at all and has a terse word for others."""
    for name in ("logging_steps", "save_steps", "eval_steps"):
        last = last_of(flags, name)
        if last is not None and last.values:
            with contextlib.suppress(ValueError):  # no number: the parser says so
                check_steps(name, float(last.value()))


def _take_auto(flags: Sequence[Flag]) -> tuple[list[Flag], bool]:
    """Keep the last --learning_rate alone; take it out too if it is "auto"."""
    last = last_of(flags, "learning_rate")
    auto = last is not None and last.values == (AUTO,)
    rest = [flag for flag in flags if flag.name != "learning_rate"]
    return (rest if last is None or auto else [*rest, last]), auto


def _settle_resume(flags: Sequence[Flag]) -> list[Flag]:
    """Read --resume_from_checkpoint as transformers means it: true is --resume, a directory is where to go on from."""
    last = last_of(flags, "resume_from_checkpoint")
    if last is None:
        return list(flags)
    rest = [flag for flag in flags if flag.name != "resume_from_checkpoint"]
    word = last.value().lower() if last.values else TRUE[0]
    if word in FALSE:
        return rest
    return [*rest, *([] if word in TRUE else [last]), Flag("resume", ("True",))]


def _settle_device(flags: Sequence[Flag]) -> tuple[list[Flag], tuple[str, ...]]:
    """Without a GPU say so to transformers, and use bf16 for fp16, which has no kernels to train with on a CPU."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return list(flags), ()
    found = [flag for flag in flags if flag.name not in ("use_cpu", "fp16")]
    found.append(Flag("use_cpu", ("True",)))
    half = last_of(flags, "fp16")
    if half is None or not half.switch():
        return found, ()
    rest = [flag for flag in found if flag.name != "bf16"]
    note = "--fp16: a CPU does not train in fp16; bf16 is used, which has the same size"
    return [*rest, Flag("bf16", ("True",))], (note,)


def check(arguments: Arguments) -> None:
    """Refuse what can't be run, before anything is loaded. Raises InvalidArgument."""
    lora, training, run = arguments.lora, arguments.training, arguments.run
    if run.tasks is None and not (training.use_lora or lora.q_lora):
        raise InvalidArgument("manylora trains adapters: add --use_lora, or --q_lora for a base in 4 bits")
    if run.tasks is None and not arguments.data.data_path:
        raise InvalidArgument("--data_path is missing: the JSON, JSONL, CSV or Parquet file to train on")
    _check_output(arguments)
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
    _check_manifest(arguments)
    check_fields(training, arguments.given)


def _check_manifest(arguments: Arguments) -> None:
    """Refuse what no manifest could hold."""
    run = arguments.run
    if not 0 <= run.route_examples <= MAX_EXAMPLES:
        raise InvalidArgument(
            f"--route_examples {run.route_examples}: expected 0, for none, to {MAX_EXAMPLES}"
        )
    if run.description is not None and len(run.description) > MAX_DESCRIPTION:
        raise InvalidArgument(
            f"--description has {len(run.description)} characters: at most {MAX_DESCRIPTION} are kept"
        )


def _check_output(arguments: Arguments) -> None:
    directory = arguments.training.output_dir
    if "output_dir" not in arguments.given:
        if arguments.run.tasks is None:
            raise InvalidArgument("--output_dir is missing: the directory for the adapter")
        return
    if not directory:
        raise InvalidArgument("--output_dir is empty: expected the directory for the adapter")
    base = Path(arguments.model.model_name_or_path or "")
    if base.is_dir() and base.resolve() == Path(directory).resolve():
        # The adapter's tokenizer and template would take the place of the base's.
        raise InvalidArgument(f"--output_dir {directory} is the base's own directory: give another one")


def resumes_elsewhere(arguments: Arguments) -> bool:
    """Return whether the checkpoint to go on from is none of those in --output_dir."""
    named, directory = arguments.training.resume_from_checkpoint, Path(str(arguments.training.output_dir))
    return named is not None and Path(named).resolve().parent != directory.resolve()


def _check_pairs(arguments: Arguments) -> None:
    run = arguments.run
    if arguments.lora.double_quant and not arguments.lora.q_lora:
        raise InvalidArgument("--double_quant is about the NF4 scales of --q_lora: add that, or leave it out")
    if run.auto_fit_cut and not run.auto_fit:
        raise InvalidArgument("--auto_fit_cut says how far --auto_fit may cut examples: give --auto_fit too")
    if run.auto_fit_cut and run.auto_fit_cut < 2:
        raise InvalidArgument(
            f"--auto_fit_cut {run.auto_fit_cut}: expected at least 2 tokens, or 0 for no cut"
        )
    if run.from_adapter and arguments.lora.lora_weight_path not in ("", run.from_adapter):
        raise InvalidArgument("--from_adapter and --lora_weight_path name two adapters: give one of them")
    if arguments.adapter_start and arguments.lora.init_lora_weights != "default":
        raise InvalidArgument(
            "--init_lora_weights says how a new adapter begins, and --from_adapter begins with one that is there: give"
            " one of them"
        )
    if run.resume and run.overwrite_output_dir and not resumes_elsewhere(arguments):
        raise InvalidArgument(
            "--resume goes on with the run in --output_dir, which --overwrite_output_dir would remove: give one of them"
        )
    _check_evaluation(arguments)
    if schedule := arguments.lora.rank_schedule:
        (AdaLoraBudget if schedule.startswith(PREFIX) else RankSchedule).parse(schedule)
    if run.tasks is None and run.early_stopping_patience and arguments.training.eval_strategy == "no":
        raise InvalidArgument("--early_stopping_patience needs --eval_strategy steps or epoch")
    if arguments.lora.rank_schedule and (arguments.training.fsdp or arguments.training.deepspeed):
        raise InvalidArgument(
            "--rank_schedule changes the trained parameters between steps, which --fsdp and --deepspeed have sharded by"
            " then: leave one of them out"
        )
    check_sharding(
        arguments.training,
        searches=arguments.learning_rate_auto,
        init=arguments.lora.init_lora_weights,
    )


def _check_evaluation(arguments: Arguments) -> None:
    """Refuse an evaluation without data, and a judge that the run won't have."""
    run, data, training = arguments.run, arguments.data, arguments.training
    evaluates = training.eval_strategy != "no" or training.eval_on_start or training.do_eval
    wanted = evaluates or run.early_stopping_patience or run.eval_answers != "none"
    if run.tasks is None and wanted and not (data.eval_data_path or data.eval_share > 0):
        raise InvalidArgument("evaluation needs data: give --eval_data_path FILE, or --eval_share 0.05")
    of_answers = sorted(name for name in arguments.given if name.startswith("eval_answers_"))
    if of_answers and run.eval_answers == "none":
        raise InvalidArgument(f"--{of_answers[0]} has no effect without --eval_answers")
    metric = training.metric_for_best_model
    judged = {kind: name for kind, name in METRIC_NAMES.items() if kind == run.eval_answers}
    names = ("loss", "perplexity", *judged.values())
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise InvalidArgument(
            f"--metric_for_best_model {metric}: this run measures {', '.join(names)}; --eval_answers measures more"
        )
    if training.save_strategy == "best" and metric is None:
        raise InvalidArgument("--save_strategy best needs --metric_for_best_model, as in loss")
