"""What bitsandbytes' NF4 layers need before they are trained on: one type everywhere, and weights that stay put."""

from typing import Any

import torch

from manylora.quant.nf4 import Nf4Tensor
from manylora.training.bases.quantized import QuantizedLinear


def settle_nf4(model: Any, dtype: torch.dtype) -> None:
    """Make a loaded NF4 model compute in ``dtype``, forward and backward, and cast what isn't quantised to it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    for path, layer in layers.items():
        state = layer.weight.quant_state
        if layer.weight.device.type == "cpu" and state.shape[1] % state.blocksize:
            model.set_submodule(path, _own_layer(layer, dtype))
            continue
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        # The backward pass dequantises to this type. Another one than the forward's would round the weight anew.
        state.dtype = dtype
        # On CPUs with AVX-512 BF16 an evaluation would repack the weight, scales rounded to bfloat16, for a kernel that
        # has no backward pass: every step after it would lose its gradients without a word.
        layer.support_avx512bf16_for_cpu = False


def _own_layer(layer: Any, dtype: torch.dtype) -> QuantizedLinear:
    """Return our layer with the same codes. bitsandbytes 0.50 dequantises on a CPU as if each row began a block: where
    rows aren't whole blocks its weights are wrong."""
    from bitsandbytes.functional import dequantize_blockwise

    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = layer.weight.data.view(torch.uint8).view(-1)
    packed = Nf4Tensor(codes, absmax.float(), tuple(state.shape), state.blocksize)
    return QuantizedLinear(packed, None if layer.bias is None else layer.bias.data, dtype)
