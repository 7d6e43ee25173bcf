"""Bases of every family served and adapters of every kind that is merged, made with transformers and peft."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from manylora.adapters.export.settings import ExportSettings
from manylora.adapters.files import BASE_FILE
from manylora.loadtest.material.checkpoints import ATTENTION, MLP, TINY, BaseShape, write_base

FAMILIES: dict[str, BaseShape] = {
    "qwen2": replace(TINY, num_layers=2),
    "qwen2-untied": replace(TINY, tied=False),
    "qwen3": replace(TINY, family="qwen3"),
    "llama": replace(TINY, family="llama", tied=False),
    "mistral": replace(TINY, family="mistral"),
}
MIXED: dict[str, Any] = {
    "rank_pattern": {"layers.1.mlp.up_proj": 3, "q_proj": 8},
    "alpha_pattern": {"q_proj": 4, "o_proj": 32},
}
TOKENS = torch.tensor([[5, 17, 300, 42, 99, 7, 230, 12], [9, 9, 31, 250, 3, 77, 101, 2]])


def make_base(directory: Path, family: str = "qwen2", dtype: torch.dtype = torch.bfloat16) -> Path:
    return write_base(directory, FAMILIES[family], dtype=dtype)


def load(directory: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more).eval()


def make_adapter(
    directory: Path, base: Path, *, strength: float = 0.05, seed: int = 1, model: Any = None, **config: Any
) -> Any:
    """Write a peft adapter with every trained tensor moved by noise, and return base + adapter, float32.

    It says which form of the base it is for.
    """
    config = {"r": 4, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            load(base) if model is None else model, LoraConfig(task_type="CAUSAL_LM", **config)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=strength)
        adapted.save_pretrained(directory)
    kind = "nf4" if getattr(model, "is_loaded_in_4bit", False) else "dense"
    (directory / BASE_FILE).write_text(json.dumps({"kind": kind, "double_quant": False}))
    return adapted.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def settings(base: Path, adapter: Path, output: Path, **more: Any) -> ExportSettings:
    return ExportSettings(adapter=adapter, output=output, base=base, **more)
