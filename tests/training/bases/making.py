"""Small checkpoints in every format, made from one random base by the number-by-number packers of tests/quant."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.loadtest.material.checkpoints import TINY, linear_shapes, write_base
from manylora.training.bases.load import Base, BaseSettings, load_base
from tests.quant.packers import Codes, awq_tensors, gptq_tensors, nearest_codes

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
SMALL = replace(TINY, hidden_size=64, intermediate_size=96, vocab_size=288)
GROUP = 32
IDS = torch.randint(3, 280, (2, 19), generator=torch.Generator().manual_seed(5))


def write_dense(directory: Path, family: str = "qwen2", *, tied: bool = True) -> Path:
    return write_base(directory, replace(SMALL, family=family, tied=tied), dtype=torch.bfloat16)


def write_gptq(source: Path, target: Path, *, bits: int = 4, desc_act: bool = False) -> Path:
    section = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": desc_act,
        "checkpoint_format": "gptq",
    }
    quantize = partial(nearest_codes, group_size=GROUP, bits=bits, desc_act=desc_act)
    return _write(source, target, section, quantize, partial(gptq_tensors, zero_offset=1))


def write_awq(source: Path, target: Path) -> Path:
    section = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return _write(source, target, section, partial(nearest_codes, group_size=GROUP, bits=4), awq_tensors)


def load(directory: Path, *, q_lora: bool = False, double_quant: bool = False) -> Base:
    cpu = torch.device("cpu")
    return load_base(
        BaseSettings(str(directory), q_lora=q_lora, double_quant=double_quant, dtype="fp32", device=cpu)
    )


def _write(
    source: Path,
    target: Path,
    section: dict[str, object],
    quantize: Callable[[Tensor], Codes],
    pack: Callable[[Codes], dict[str, Tensor]],
) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for path in linear_shapes(source):
        packed = pack(quantize(tensors.pop(f"{path}.weight")))
        tensors |= {f"{path}.{name}": value for name, value in packed.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return target
