"""Adapters to test with: PEFT directories written by hand, for a base of two small layers."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from manylora.adapters.types import BaseModules, ModuleShape

HIDDEN, KV, MLP, LAYERS, VOCABULARY = 32, 16, 48, 2, 64
SHAPES = {
    "self_attn.q_proj": ModuleShape(HIDDEN, HIDDEN),
    "self_attn.k_proj": ModuleShape(KV, HIDDEN),
    "self_attn.v_proj": ModuleShape(KV, HIDDEN),
    "self_attn.o_proj": ModuleShape(HIDDEN, HIDDEN),
    "mlp.gate_proj": ModuleShape(MLP, HIDDEN),
    "mlp.up_proj": ModuleShape(MLP, HIDDEN),
    "mlp.down_proj": ModuleShape(HIDDEN, MLP),
}
MODULES: BaseModules = {
    f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()
}


def config(**changes: object) -> dict[str, object]:
    """A LoRA config of rank 4 on q_proj and v_proj, with ``changes``."""
    plain: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    return plain | changes


def factors(
    seed: int = 0, *, rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj")
) -> dict[str, Tensor]:
    """Non-zero factors for every module that ends with one of ``targets``, under peft's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, shape in MODULES.items():
        if path.rsplit(".", 1)[-1] in targets:
            a = torch.randn(rank, shape.in_features, generator=generator)
            b = torch.randn(shape.out_features, rank, generator=generator)
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
    return tensors


def pool(directory: Path, way: str, *modules: str) -> None:
    """Have an adapter or a base say how texts are pooled, as sentence-transformers does."""
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": way}))
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    listed = [{"path": paths[each], "type": f"sentence_transformers.models.{each}"} for each in modules]
    if modules:
        (directory / "modules.json").write_text(json.dumps(listed))


def write(
    directory: Path,
    seed: int = 0,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    files: Mapping[str, str] | None = None,
    changes: Mapping[str, object] | None = None,
) -> Path:
    """Write an adapter; ``changes`` go into its config, ``files`` beside it. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config(**(changes or {}))))
    save_file(dict(factors(seed) if tensors is None else tensors), directory / "adapter_model.safetensors")
    for name, text in (files or {}).items():
        (directory / name).write_text(text)
    return directory
