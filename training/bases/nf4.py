"""What bitsandbytes' NF4 layers need before they are trained on: one type everywhere, and weights that stay put."""

from typing import Any

import torch


def settle_nf4(model: Any, dtype: torch.dtype) -> None:
    """Make a loaded NF4 model compute in ``dtype``, forward and backward, and cast what isn't quantised to it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in model.modules():
        if not isinstance(module, Linear4bit):
            continue
        module.compute_dtype, module.compute_type_is_set = dtype, True
        # The backward pass dequantises to this type. Another one than the forward's would round the weight anew.
        module.weight.quant_state.dtype = dtype
        # On CPUs with AVX-512 BF16 an evaluation would repack the weight, scales rounded to bfloat16, for a kernel that
        # has no backward pass: every step after it would lose its gradients without a word.
        module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)
