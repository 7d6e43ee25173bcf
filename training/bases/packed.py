"""GPTQ and AWQ checkpoints as transformers models, without auto-gptq or gptqmodel: our reader, our layer.

The model is built from its config with empty weights; each packed linear layer is replaced by a QuantizedLinear, and
the rest is read tensor by tensor. Strict both ways: every tensor is used, every weight is filled.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import QuantError
from manylora.quant.format import StoredFormat, read_dense
from manylora.training.bases.quantized import PackedTensor, QuantizedLinear
from manylora.training.errors import BaseRefused

_IGNORED = (".rotary_emb.inv_freq", ".masked_bias")
"""Ends of names that old checkpoints carry and models compute themselves."""
_LISTED = 5


def load_packed(
    checkpoint: Checkpoint,
    stored: StoredFormat,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Any:
    """Return the model, its packed layers as they are stored and the rest in ``dtype``. Raises BaseRefused."""
    model = _empty_model(checkpoint, dtype, trust_remote_code)
    try:
        used = set(_fill_packed(model, checkpoint, stored, dtype, device))
        used |= _fill_rest(model, checkpoint, dtype, device)
    except QuantError as error:
        raise BaseRefused(str(error)) from None
    left_over = sorted(name for name in checkpoint.names() - used if not name.endswith(_IGNORED))
    if left_over:
        raise BaseRefused(
            f"{checkpoint.directory}: {len(left_over)} tensors are of no module of the model: {_some(left_over)}"
        )
    model.tie_weights()
    model.to(device)
    model.eval()
    return model


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Buffers are made for real: rotary frequencies are computed, not stored.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.name_or_path = model.config._name_or_path = str(checkpoint.directory)
    if (checkpoint.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model


def _fill_packed(
    model: nn.Module, checkpoint: Checkpoint, stored: StoredFormat, dtype: torch.dtype, device: torch.device
) -> Iterator[str]:
    """Replace the packed layers; yield the tensor names that they took."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for path, linear in linears.items():
        if not stored.packs(checkpoint, path):
            continue
        packed, taken = stored.read(checkpoint, path)
        assert isinstance(packed, PackedTensor)
        if packed.shape != (linear.out_features, linear.in_features):
            raise BaseRefused(
                f"{checkpoint.directory}: {path} is {list(packed.shape)}, but config.json says "
                f"[{linear.out_features}, {linear.in_features}]"
            )
        yield from taken
        bias = _read_bias(checkpoint, path, linear)
        if f"{path}.bias" in checkpoint.names():
            yield f"{path}.bias"
        model.set_submodule(path, QuantizedLinear(packed.to(device), bias, dtype))


def _read_bias(checkpoint: Checkpoint, path: str, linear: nn.Linear) -> Tensor | None:
    name = f"{path}.bias"
    has_bias = "bias" in dict(linear.named_parameters(recurse=False))
    if not has_bias and name not in checkpoint.names():
        return None
    bias = read_dense(checkpoint, name)
    # GPTQ writes a bias for every layer; where the model has none it is zero.
    if not has_bias and bool(bias.any()):
        raise BaseRefused(
            f"{checkpoint.directory}: {name} is not zero, but the config says that this layer has no bias"
        )
    return bias if has_bias else None


def _fill_rest(model: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> set[str]:
    """Read every weight that is still empty; return the tensor names of the model that the checkpoint has."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    used: set[str] = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in checkpoint.names():
            used.add(name)
        if not parameter.is_meta or (name in tied and name not in checkpoint.names()):
            continue
        tensor = read_dense(checkpoint, name)
        if tensor.shape != parameter.shape:
            raise BaseRefused(
                f"{checkpoint.directory}: {name} is {list(tensor.shape)}, but config.json says "
                f"{list(parameter.shape)}"
            )
        path, _, attribute = name.rpartition(".")
        filled = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
        setattr(model.get_submodule(path), attribute, filled)
    return used


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
