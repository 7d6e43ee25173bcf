"""Small models as GPTQ and AWQ checkpoints, packed by the tests' own packer, and as transformers computes them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.quant.packers import Codes
from tests.server.model.models import random_model

Pack = Callable[[Codes], dict[str, Tensor]]


def save_quantized(
    family: str,
    directory: Path,
    section: Mapping[str, Any],
    quantize: Callable[[Tensor], Codes],
    pack: Pack,
    left_alone: tuple[str, ...] = (),
    head: bool = False,
) -> torch.nn.Module:
    """Write a model whose linear layers are packed, and return the model with their values in float32.

    ``left_alone``: suffixes of modules that stay as they are; ``head``: pack lm_head too.
    """
    model = random_model(family)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or path.endswith(left_alone):
            continue
        if path == "lm_head" and not head:
            continue
        codes = quantize(module.weight.detach())
        steps = torch.from_numpy(codes.codes - codes.zeros[codes.g_idx]).float()
        values = (codes.scales.float()[codes.g_idx] * steps).T
        module.weight.data.copy_(values)
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in pack(codes).items()}
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": dict(section)}
    (directory / "config.json").write_text(json.dumps(config, default=str))
    return cast(torch.nn.Module, model)
