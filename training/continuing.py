"""What a resumed run has in common with the run that it goes on with: kept in every checkpoint, and compared.

A run that went on with another alpha, base or data file would end as no run that was ever meant.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manylora.training.arguments import Arguments
from manylora.training.data.files import data_fingerprint, parse_data_path
from manylora.training.distributed import world_size
from manylora.training.errors import InvalidArgument
from manylora.training.report.record import SearchFacts, plain

FREE = frozenset(
    (
        # data, where it is and how it is read
        "data_path",
        "eval_data_path",
        "lazy_preprocess",
        "data_check",
        # the adapter that the run began with is compared by its content
        "lora_weight_path",
    )
)
"""Arguments of data and adapter that may differ: all others must not, those that are yet to come too."""
OF_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "model_max_length",
)
"""Training arguments that must be the same: they are in the checkpoint's optimiser and schedule, or decide what the
rows are. How far the run goes, what is logged, saved and evaluated, and on what it runs may differ."""
BATCH = "per_device_train_batch_size × gradient_accumulation_steps"
SETTLED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "model_max_length",
)
"""What --auto_fit may have changed, beside the base's bits."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a checkpoint says of its run."""

    facts: Mapping[str, Any]
    """By the names of flags; "data", "base" and "from_adapter" by content."""
    settled: Mapping[str, Any]
    """What the run found by itself (--learning_rate auto, --auto_fit)."""
    search: SearchFacts = field(default_factory=SearchFacts)
    """How it looked for a learning rate: for its report."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Kept":
        """Read the part of a checkpoint's state that is about this; empty for one that has none."""
        run = state.get("run")
        run = run if isinstance(run, dict) else {}
        search = SearchFacts.of(run.get("search") or {})
        return cls(run.get("facts") or {}, run.get("settled") or {}, search)

    def state(self) -> dict[str, Any]:
        """Return it as JSON."""
        search = plain(dataclasses.asdict(self.search))
        return {"facts": dict(self.facts), "settled": dict(self.settled), "search": search}


def keep(
    arguments: Arguments, changes: Mapping[str, Any], base: str, search: SearchFacts | None = None
) -> Kept:
    """Return what a run's checkpoints say of it. ``base`` is the base's fingerprint, ``changes`` what was settled."""
    training = arguments.training
    values = {name: changes.get(name, getattr(training, name)) for name in SETTLED}
    settled: dict[str, Any] = {"learning_rate": changes.get("learning_rate", training.learning_rate)}
    if arguments.run.auto_fit:
        lora = arguments.lora
        settled |= {**values, "q_lora": lora.q_lora, "double_quant": lora.double_quant}
    return Kept({**facts_of(arguments, changes), "base": base}, plain(settled), search or SearchFacts())


def facts_of(arguments: Arguments, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what can be told before a base is loaded: values by the names of flags, and the data's hashes."""
    training = arguments.training
    facts: dict[str, Any] = {}
    for part in (arguments.data, arguments.lora):
        names = (each.name for each in dataclasses.fields(part) if each.name not in FREE)
        facts |= {name: getattr(part, name) for name in names}
    facts["lora_target_modules"] = sorted(arguments.lora.lora_target_modules)
    values = {name: changes.get(name, getattr(training, name)) for name in OF_TRAINING}
    facts |= {name: getattr(value, "value", value) for name, value in values.items()}
    facts["data_seed"] = training.seed if training.data_seed is None else training.data_seed
    batch = [
        changes.get(name, getattr(training, name))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    ]
    facts[BATCH] = batch[0] * batch[1] * world_size()
    facts["data"] = _hashes(arguments.data.data_path)
    facts["from_adapter"] = _adapter_hash(arguments.adapter_start)
    found: dict[str, Any] = plain(facts)
    return found


def settled_again(arguments: Arguments, kept: Kept) -> tuple[Arguments, dict[str, Any]]:
    """Return the arguments with what the run had found by itself, and the changes of training arguments."""
    changes: dict[str, Any] = {}
    if arguments.learning_rate_auto and "learning_rate" in kept.settled:
        changes["learning_rate"] = kept.settled["learning_rate"]
    if not arguments.run.auto_fit:
        return arguments, changes
    changes |= {name: kept.settled[name] for name in SETTLED if name in kept.settled}
    lora, training = dataclasses.replace(arguments.lora), arguments.training
    lora.q_lora = bool(kept.settled.get("q_lora", lora.q_lora))
    lora.double_quant = bool(kept.settled.get("double_quant", lora.double_quant))
    training.model_max_length = changes.pop("model_max_length", training.model_max_length)
    return dataclasses.replace(arguments, lora=lora), changes


def compare(checkpoint: Path, kept: Kept, now: Mapping[str, Any]) -> None:
    """Raise InvalidArgument with the names of all that differs from the run of ``checkpoint``."""
    other = [name for name in now if name in kept.facts and kept.facts[name] != now[name]]
    if not other:
        return
    told = "; ".join(_told(name, kept.facts[name], now[name]) for name in other)
    raise InvalidArgument(
        f"--resume: {checkpoint} is of a run with other settings: {told}. Go on with the same, or start a new run"
        f" from its weights with --from_adapter {checkpoint}"
    )


def _told(name: str, there: object, now: object) -> str:
    if name == "data":
        return "--data_path holds other data"
    if name == "base":
        return "--model_name_or_path is another base"
    if name == "from_adapter":
        return f"--from_adapter is {_adapter(now)} now and was {_adapter(there)}"
    return f"--{name} is {_short(now)} now and was {_short(there)}"


def _adapter(value: object) -> str:
    return "none" if value is None else "another"


def _short(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) and value else str(value)


def _hashes(paths: Sequence[str]) -> list[list[object]]:
    hashes = data_fingerprint(paths)
    return [[hashes[each.path], each.share] for each in map(parse_data_path, paths)]


def _adapter_hash(directory: str | None) -> str | None:
    if directory is None:
        return None
    path = str(Path(directory) / "adapter_model.safetensors")
    return data_fingerprint([path])[path]
