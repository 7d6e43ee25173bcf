"""An adapter to start a run from: what its adapter_config.json says it is, which the run then is too.

What would change what the adapter computes is taken over or refused, never left out.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from manylora.training.bases.save import CONFIG_FILE, WEIGHTS_FILE
from manylora.training.bases.settings import LoraSettings
from manylora.training.errors import InvalidArgument, reason_of

FLAGS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "bias": "lora_bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
}
"""PEFT's fields that this command has flags for, and those."""
_INVOCATION = "alora_invocation_tokens"
_READ = frozenset(
    (*FLAGS, "target_modules", "rank_pattern", "alpha_pattern", "init_lora_weights", _INVOCATION)
)
_BY_TENSORS = frozenset(("exclude_modules", "layers_to_transform", "layers_pattern"))
"""Fields that narrow the targets: which are left is read from the tensors' names."""
_OF_TRAINING = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "trainable_token_indices",
    )
)
"""Fields that change nothing of the start, or that the tensors are held against."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PREFIX = "base_model.model."


def settings_of_adapter(directory: Path, asked: LoraSettings, given: frozenset[str]) -> LoraSettings:
    """Return ``asked`` as the adapter in ``directory`` is: rank, alpha and their patterns, targets, kind of LoRA.

    Dropout stays what was asked for. Raises InvalidArgument for an adapter that can't be gone on from, and for a flag
    that was ``given`` and says otherwise.
    """
    path = directory / CONFIG_FILE
    config = _read(path)
    _refuse(config, path)
    found = replace(
        asked,
        r=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        rank_pattern={str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
        alpha_pattern={str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
        targets=_targets(config, directory),
        bias=config.get("bias") or "none",
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        invocation=tuple(config.get(_INVOCATION) or ()),
    )
    names = {"lora_alpha": "alpha"}
    for name, flag in FLAGS.items():
        field = names.get(name, name)
        wanted, own = getattr(asked, field), getattr(found, field)
        if flag in given and wanted != own:
            raise InvalidArgument(
                f"--{flag} {wanted} differs from the adapter's {own} ({path}): leave it out"
            )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        for name, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (str, list))):
            if not isinstance(config[name], kind) or isinstance(config[name], bool):
                raise ValueError(f"{name} is {config[name]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgument(f"--from_adapter: {path} can't be read: {reason_of(error)}") from None
    return dict(config)


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InvalidArgument(
            f"--from_adapter: {path} is of the kind {kind}, and only LORA can be gone on from"
        )
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise InvalidArgument(
            f"--from_adapter: {path} has init_lora_weights {config['init_lora_weights']!r}, and belongs to a base that"
            " was changed with it; convert it with save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    for name, value in sorted(config.items()):
        if value and name not in _READ | _BY_TENSORS | _OF_TRAINING:
            raise InvalidArgument(
                f"--from_adapter: {path} has {name} {value!r}, which can't be gone on with here"
            )


def _targets(config: Mapping[str, Any], directory: Path) -> tuple[str, ...]:
    """Return the names of the adapted modules; where a pattern says which, their paths, from the tensors' names."""
    named = config["target_modules"]
    if isinstance(named, list) and not any(config.get(name) for name in _BY_TENSORS):
        return tuple(named)
    path = directory / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise InvalidArgument(f"--from_adapter: {path} can't be read: {reason_of(error)}") from None
    paths = (name.partition(".lora_")[0].removeprefix(_PREFIX) for name in names if ".lora_" in name)
    return tuple(dict.fromkeys(paths))
