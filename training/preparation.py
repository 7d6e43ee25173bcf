"""From arguments to what a trainer takes: the data checked and tokenised, the base loaded, the adapter on it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from manylora.training.arguments import Arguments
from manylora.training.bases.find import find_base, read_config
from manylora.training.bases.invocation import invocation_of
from manylora.training.bases.load import BaseSettings, load_base, load_tokenizer
from manylora.training.bases.lora import LoraSettings, Servable, attach, attach_notes, servable
from manylora.training.bases.save import load_adapter
from manylora.training.bases.start import settings_of_adapter
from manylora.training.bases.targets import choose_targets
from manylora.training.bases.tokens import ChatSetup, prepare_chat
from manylora.training.bases.types import Base, DtypeName
from manylora.training.check.check import CheckSettings, check_data
from manylora.training.check.report import CheckReport
from manylora.training.data.activation import check_rows
from manylora.training.data.columns import Columns, parse_columns
from manylora.training.data.dataset import DataSettings, TrainingData, load_data, load_split
from manylora.training.data.files import parse_data_path
from manylora.training.data.formats import check_columns, recognise
from manylora.training.distributed import is_first_process, wants_fsdp
from manylora.training.errors import InvalidArgument, InvalidData
from manylora.training.rank.budget import PREFIX as ADALORA
from manylora.training.rank.make import make_policy
from manylora.training.rank.policy import RankPolicy

if TYPE_CHECKING:
    from peft import PeftModel

Say = Callable[[str], None]
PLAIN_TEXT = "text"
"""The data format without turns."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that training starts from."""

    base: Base
    model: "PeftModel"
    lora: LoraSettings
    policy: RankPolicy
    train: TrainingData
    held_out: TrainingData | None
    check: CheckReport | None
    servable: Servable
    sentences: tuple[str, ...]
    """What was said on the way."""

    @property
    def saved_rank(self) -> int:
        """The largest rank that the saved adapter may have."""
        return replace(self.lora, r=self.policy.final_rank).saved_rank


def base_settings(arguments: Arguments) -> BaseSettings:
    """Return how the base is to be held."""
    training, model = arguments.training, arguments.model
    dtype: DtypeName = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    return BaseSettings(
        name=model.model_name_or_path,
        q_lora=arguments.lora.q_lora,
        double_quant=arguments.lora.double_quant,
        dtype=dtype,
        trust_remote_code=model.trust_remote_code,
        revision=model.model_revision,
        cache_dir=model.cache_dir,
        model_max_length=training.model_max_length,
        device=torch.device("cpu") if training.use_cpu else None,
        fsdp=wants_fsdp(training),
    )


def check_files(arguments: Arguments, say: Say) -> CheckReport | None:
    """Check the data before a base is loaded for it. Raises InvalidData with --data_check strict and findings."""
    data = arguments.data
    settings = base_settings(arguments)
    directory = find_base(
        settings.name,
        revision=settings.revision,
        cache_dir=settings.cache_dir,
        with_code=settings.trust_remote_code,
    )
    # A base that can't be trained on is said before anybody waits for the check.
    read_config(settings.name, directory, trust_remote_code=settings.trust_remote_code)
    columns = columns_of(arguments)
    paths = [parse_data_path(path).path for path in (*data.data_path, *data.eval_data_path)]
    check_columns(columns, paths)
    # One process of several is enough to say what it finds.
    if data.data_check == "off" or not is_first_process():
        return None
    report = check_data(
        CheckSettings(
            paths=tuple(data.data_path),
            eval_paths=tuple(data.eval_data_path),
            tokenizer=load_tokenizer(directory, settings),
            max_length=arguments.training.model_max_length,
            format=data.data_format,
            columns=columns,
        )
    )
    for sentence in report.sentences():
        say(sentence)
    if data.data_check == "strict" and not report.ok:
        raise InvalidData(
            "--data_check strict: the data has findings; `manylora data check --fix OUT` writes a file without the"
            " errors, and with --remove KIND without the warnings that you name; --data_check warn trains all the same"
        )
    return report


def columns_of(arguments: Arguments) -> Columns | None:
    """Return which columns stand for which fields. Raises InvalidArgument."""
    return None if arguments.data.columns is None else parse_columns(arguments.data.columns)


def prepare(arguments: Arguments, total_steps: Callable[[int], int], say: Say) -> Prepared:
    """Do all of it, in the order in which it can fail.

    ``total_steps`` tells the optimiser steps of a run over so many rows. Raises TrainingError.
    """
    said: list[str] = []

    def tell(sentence: str) -> None:
        said.append(sentence)
        say(sentence)

    check = check_files(arguments, tell)
    base = load_base(base_settings(arguments))
    chat = prepare_chat(base) if holds_conversations(arguments) else ChatSetup()
    for note in (*base.notes, *chat.notes):
        tell(note)
    train, held_out = load_sets(arguments, base, tell)
    lora = lora_settings(arguments)
    lora = replace(lora, invocation=_invocation(arguments, base, lora, train))
    check_targets(base, lora, arguments)
    policy = policy_of(arguments, lora)
    lora = replace(lora, r=policy.initial_rank, new_tokens=chat.new_tokens)
    final = replace(lora, r=policy.final_rank)
    answer = servable(base, final)
    tell(answer.sentence())
    for note in attach_notes(base, lora):
        tell(note)
    # The factors' first values are drawn here; the trainer seeds again for what follows.
    set_seed(arguments.training.seed)
    model = policy.attach(base, lora, total_steps(len(train.dataset))) or attach(base, lora)
    if arguments.adapter_start:
        load_adapter(model, Path(arguments.adapter_start))
        tell(f"starting from the adapter in {arguments.adapter_start}")
    return Prepared(base, model, lora, policy, train, held_out, check, answer, tuple(said))


def _invocation(arguments: Arguments, base: Base, lora: LoraSettings, train: TrainingData) -> tuple[int, ...]:
    """Return what the adapter is to act from; (): its first token. Raises InvalidArgument for what can't learn it."""
    asked = arguments.lora
    found = invocation_of(lora, base, asked.alora_invocation_string, asked.alora_invocation_tokens)
    others = {
        "--packing": arguments.data.packing,
        f"--rank_schedule {asked.rank_schedule}": asked.rank_schedule is not None,
    }
    for name in (name for name, given in others.items() if found and given):
        raise InvalidArgument(f"{name} doesn't go with an adapter that acts from an invocation on")
    if found:
        check_rows(found, (train.dataset[number] for number in range(len(train.dataset))))
    return found


def holds_conversations(arguments: Arguments) -> bool:
    """Return whether any data file has more than plain text, which needs no chat tokens."""
    data = arguments.data
    if data.data_format is not None:
        return data.data_format != PLAIN_TEXT
    columns = columns_of(arguments)
    paths = (parse_data_path(path).path for path in data.data_path)
    return any(recognise(path, columns).name != PLAIN_TEXT for path in paths)


def load_sets(arguments: Arguments, base: Base, say: Say) -> tuple[TrainingData, TrainingData | None]:
    """Read and tokenise what is trained on and what is held out."""
    data, training = arguments.data, arguments.training
    settings = DataSettings(
        paths=tuple(data.data_path),
        max_length=training.model_max_length,
        packing=data.packing,
        seed=training.seed,
        format=data.data_format,
        columns=columns_of(arguments),
        stop_ids=stop_ids(base),
    )
    if data.lazy_preprocess:
        say(
            "--lazy_preprocess is not needed: rows are checked and tokenised before the run, into files that are read"
            " as they are needed."
        )
    tokenizer: Any = base.tokenizer
    held_out: TrainingData | None = None
    if data.eval_data_path:
        train = load_data(settings, tokenizer)
        # Packed rows would be cut otherwise by another length; evaluation gains nothing from them.
        held_out = load_data(replace(settings, paths=tuple(data.eval_data_path), packing=False), tokenizer)
    elif data.eval_share:
        train, held_out = load_split(settings, tokenizer, data.eval_share)
    else:
        train = load_data(settings, tokenizer)
    for sentence in train.report.sentences():
        say(sentence)
    if held_out is not None:
        say(f"Held out for evaluation: {held_out.report.examples:,} examples.")
        files = held_out.report.files if data.eval_data_path else ()
        told = [sentence for file in files for sentence in file.sentences()]
        for sentence in (*told, *held_out.report.findings()):
            say(f"Held out: {sentence}")
    return train, held_out


def stop_ids(base: Base) -> tuple[int, ...]:
    """Return the tokens that end generation with this base."""
    found = base.model.generation_config.eos_token_id if base.model.generation_config is not None else None
    ids = [] if found is None else [found] if isinstance(found, int) else list(found)
    own = base.tokenizer.eos_token_id
    if isinstance(own, int) and own not in ids:
        ids.append(own)
    return tuple(ids)


def lora_settings(arguments: Arguments) -> LoraSettings:
    """Return the adapter that was asked for; one to start from says what wasn't."""
    lora = arguments.lora
    if lora.lora_bias not in ("none", "all", "lora_only"):
        raise InvalidArgument(f"--lora_bias {lora.lora_bias}: expected none, all or lora_only")
    settings = LoraSettings(
        r=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        targets=tuple(lora.lora_target_modules),
        bias=lora.lora_bias,  # type: ignore[arg-type]  # one of three, as was just checked
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init=lora.init_lora_weights,
        modules_to_save=tuple(lora.modules_to_save),
    )
    if arguments.adapter_start is None:
        return settings
    return settings_of_adapter(Path(arguments.adapter_start), settings, arguments.given)


def policy_of(arguments: Arguments, lora: LoraSettings) -> RankPolicy:
    """Return how the rank behaves. Raises InvalidArgument where an adapter to start from has another rank."""
    schedule = arguments.lora.rank_schedule
    policy = make_policy(schedule, lora.r, seed=arguments.training.seed)
    if arguments.adapter_start is None or schedule is None:
        return policy
    if lora.rank_pattern or lora.alpha_pattern or schedule.startswith(ADALORA):
        raise InvalidArgument(
            f"--rank_schedule {schedule} can't go on from an adapter that has ranks or alphas of its own for some"
            " modules, and AdaLoRA from none: leave it out"
        )
    if policy.initial_rank != lora.r:
        raise InvalidArgument(
            f"--rank_schedule {schedule} begins with rank {policy.initial_rank}, and {arguments.adapter_start} has"
            f" rank {lora.r}: begin the schedule with it"
        )
    return policy


def check_targets(base: Base, lora: LoraSettings, arguments: Arguments) -> None:
    """Refuse --lora_target_modules that are others than those of the adapter to start from."""
    if arguments.adapter_start is None or not arguments.lora.lora_target_modules:
        return
    wanted, _ = choose_targets(base.model, arguments.lora.lora_target_modules)
    own, _ = choose_targets(base.model, lora.targets)
    if set(wanted) != set(own):
        raise InvalidArgument(
            f"--lora_target_modules {' '.join(wanted)} are others than the adapter's, {' '.join(own)}: leave it out"
        )
