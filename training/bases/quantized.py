"""A frozen linear layer that stays in 4 or 8 bits: y = x Wᵀ + bias, with W made anew for each product.

The gradient is exact: grad_x = grad_y W with the very W of the forward pass. W itself has none, and nothing 16-bit
outlives the product.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from manylora.quant.awq import AwqTensor
from manylora.quant.gptq import GptqTensor
from manylora.quant.nf4 import Nf4Tensor

PackedTensor = GptqTensor | AwqTensor | Nf4Tensor


class QuantizedLinear(nn.Linear):
    """A packed matrix [out, in] where a model had an nn.Linear.

    It is an nn.Linear so that whatever looks for those finds it. ``weight`` is not a parameter but the dequantised
    matrix, made at each look: writing into it changes nothing, which is why ``forbid_merging`` exists.
    """

    def __init__(self, packed: PackedTensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the matrix
        self.out_features, self.in_features = packed.shape
        self.packed_type = type(packed)
        self.dtype = dtype
        self.constants: dict[str, object] = {}
        for each in fields(packed):
            value = getattr(packed, each.name)
            if isinstance(value, Tensor):
                # Parameters and not buffers, which DDP sends around before each step.
                self.register_parameter(each.name, nn.Parameter(value, requires_grad=False))
            else:
                self.constants[each.name] = value
        frozen = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def packed(self) -> PackedTensor:
        """The matrix as the checkpoint holds it."""
        tensors = {
            name: value.detach() for name, value in self.named_parameters(recurse=False) if name != "bias"
        }
        return self.packed_type(**tensors, **self.constants)  # type: ignore[arg-type]  # the fields it came from

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear has a parameter there
        """The dequantised matrix [out, in] in the base's type: a new tensor each time."""
        return self.packed.dequantize(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return x Wᵀ + bias in x's type, or autocast's: x [..., in] to [..., out]."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        product: Tensor = _FrozenProduct.apply(input, self.packed)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Move, but never cast, the scales: the codes were chosen for the scales as they are stored."""
        name = "absmax" if self.packed_type is Nf4Tensor else "scales"
        stored = self.get_parameter(name).detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.get_parameter(name)
        if moved.dtype != stored.dtype:
            moved.data = stored.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Return the sizes and the format."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, {self.packed_type.format}, bias={bias}"


def forbid_merging(model: nn.Module) -> None:
    """Make peft's merge on packed layers raise: it would write into a copy of the weight, and lose the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), QuantizedLinear):
            module.merge = _refuse_merge


def _refuse_merge(*_: object, **__: object) -> None:
    raise NotImplementedError(
        "a GPTQ or AWQ layer can't take an adapter in: save the adapter and run `manylora merge`"
    )


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ for a frozen packed W: the context keeps the packed matrix, neither x nor W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedTensor) -> Tensor:
        ctx.packed = packed
        return nn.functional.linear(x, packed.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.packed.dequantize(gradient.dtype), None
