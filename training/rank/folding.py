"""From AdaLoRA's three factors to a plain LoRA adapter that any server takes.

AdaLoRA computes W x + α / (r₀ + 10⁻⁵) · B (E ∘ A) x with the rank r₀ that it started from, whatever the budget took
away since (peft 0.21, tuners/adalora/layer.py; 2303.10512). Here E goes into A, rows whose E is 0 are left out, and
the scale is LoRA's α'/r' with α' = α · r'/r₀. A module that has no row left is no longer a target.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from manylora.training.bases.save import CONFIG_FILE, WEIGHTS_FILE, make_plain

if TYPE_CHECKING:
    from peft import AdaLoraConfig, PeftModel
    from peft.tuners.adalora import AdaLoraLayer

_PREFIX = "base_model.model."
_ADDED_TO_RANK = 1e-5
"""What peft adds to r₀ before it divides by it."""


class Factors(NamedTuple):
    """One module's plain factors: A [r', in] and B [out, r']."""

    a: Tensor
    b: Tensor


def save_folded(model: "PeftModel", directory: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, an ordinary LoRA adapter."""
    factors = {path: _fold(layer, model.active_adapter) for path, layer in adalora_layers(model)}
    kept = {path: _without_zero_rows(pair) for path, pair in factors.items() if pair.a.any()}
    # Before the first step E is 0 everywhere: an adapter that changes nothing is still an adapter.
    kept = kept or {path: Factors(a[:1], b[:, :1]) for path, (a, b) in factors.items()}
    tensors = _other_tensors(model)
    for path, pair in kept.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = pair.b.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _plain_config(
        model.peft_config[model.active_adapter], {path: len(pair.a) for path, pair in kept.items()}
    )
    (directory / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    make_plain(model, directory)


def adalora_layers(model: "PeftModel") -> Iterator[tuple[str, "AdaLoraLayer"]]:
    """Yield the base's path of every adapted layer, and peft's layer."""
    from peft.tuners.adalora import AdaLoraLayer

    for name, module in model.named_modules():
        if isinstance(module, AdaLoraLayer) and model.active_adapter in module.lora_A:
            yield name.removeprefix(_PREFIX), module


def _fold(layer: "AdaLoraLayer", adapter: str) -> Factors:
    rank: float = layer.ranknum[adapter].item()
    a = layer.lora_A[adapter].detach() * layer.lora_E[adapter].detach()
    return Factors(a * (rank / (rank + _ADDED_TO_RANK)), layer.lora_B[adapter].detach())


def _without_zero_rows(pair: Factors) -> Factors:
    kept = pair.a.any(dim=1)
    return Factors(pair.a[kept], pair.b[:, kept])


def _other_tensors(model: "PeftModel") -> dict[str, Tensor]:
    """Return what is saved beside the factors: whole modules, biases, tokens' rows."""
    from peft import get_peft_model_state_dict

    config: AdaLoraConfig = model.peft_config[model.active_adapter]
    # With a pattern, peft cuts its factors down by it and renames the pattern's modules on the way.
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    finally:
        config.rank_pattern = pattern
    ours = (".lora_A", ".lora_B", ".lora_E")
    # Cloned: a tied head and its embedding are one tensor with two names, which safetensors refuses.
    return {name: tensor.detach().clone() for name, tensor in state.items() if not name.endswith(ours)}


def _plain_config(config: "AdaLoraConfig", ranks: Mapping[str, int]) -> dict[str, Any]:
    from peft import LoraConfig

    largest = max(ranks.values())
    alphas = {path: config.lora_alpha * rank / config.init_r for path, rank in ranks.items()}
    plain = LoraConfig(
        task_type=config.task_type,
        r=largest,
        lora_alpha=config.lora_alpha * largest / config.init_r,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != largest},
        alpha_pattern={path: alphas[path] for path, rank in ranks.items() if rank != largest},
        target_modules=list(ranks),
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    ).to_dict()
    return {**plain, "target_modules": sorted(ranks)}
