"""Starting points of the factors that are taken from the base's weights, without changing the base.

PiSSA (2404.02948) and OLoRA (2406.01775) put the largest part of W into the factors and train W − s·B₀A₀ + s·BA.
Stored like that, the base is another one, and rounding it to 16 or 4 bits again makes it a third. Here W stays as it
is and −s·B₀A₀ is a frozen term beside it (``Residual``): the function at the start is the base's to rounding, it works
on 4-bit bases too, and what was trained is a plain LoRA of rank r + r₀ on the unchanged base: A over A₀, B beside −B₀
(save.py).

LoftQ (2310.08659) starts the factors from what quantisation took away, W₁₆ − W₄. Its first round leaves W₄ alone, so
the adapter belongs to the plain NF4 base; further rounds, which quantise anew, would not.
"""

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.format import read_dense
from manylora.training.bases.quantized import QuantizedLinear
from manylora.training.bases.types import Base

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
"""peft's name for the adapter that is trained."""
PISSA_ROUNDS = re.compile(r"pissa_niter_(\d+)")
_SEED = 0


class Residual(nn.Module):
    """A base layer less the start of its factors: y = base(x) − s₀·B₀(A₀ x). Stands where peft keeps the base layer."""

    def __init__(self, base_layer: nn.Module, start_a: Tensor, start_b: Tensor, scale: float) -> None:
        super().__init__()
        self.base_layer = base_layer  # by this name peft finds what lies below
        self.start_a = nn.Parameter(start_a, requires_grad=False)
        """A₀ float32 [r₀, in]"""
        self.start_b = nn.Parameter(start_b, requires_grad=False)
        """B₀ float32 [out, r₀]"""
        self.scale = scale
        self.is_off = False
        """Whether the base layer alone is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., out] in the base layer's type."""
        result: Tensor = self.base_layer(x)
        if self.is_off:
            return result
        start = nn.functional.linear(
            nn.functional.linear(x.to(self.start_a.dtype), self.start_a), self.start_b
        )
        return result - (self.scale * start).to(result.dtype)


def lora_layers(model: "PeftModel") -> Iterator[tuple[str, "LoraLayer"]]:
    """Yield the base's path of every linear layer with LoRA, and peft's layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name.removeprefix("base_model.model."), module


@torch.no_grad()
def start_from_base(model: "PeftModel", init: str) -> None:
    """Start every layer's factors from its weight: "pissa", "pissa_niter_N" (N rounds of a quicker SVD) or "olora"."""
    for _, layer in lora_layers(model):
        weight = dense_weight(layer.get_base_layer())
        rank, scale = layer.r[ADAPTER], float(layer.scaling[ADAPTER])
        a, b = _orthonormal_rows(weight, rank) if init == "olora" else _principal(weight, rank, init)
        # s·B₀A₀ is the part of W that was meant.
        a, b = (a, b) if init == "olora" else (a * scale**-0.5, b * scale**-0.5)
        _set_factors(layer, a, b)
        layer.base_layer = Residual(layer.base_layer, a.clone(), b.clone(), scale)


@torch.no_grad()
def start_from_error(model: "PeftModel", base: Base) -> None:
    """LoftQ: start every layer's factors from the largest part of W₁₆ − W₄, read from the base's own files."""
    checkpoint = Checkpoint(base.directory)
    for path, layer in lora_layers(model):
        held = dense_weight(layer.get_base_layer())
        error = read_dense(checkpoint, f"{path}.weight").to(held) - held
        scale = float(layer.scaling[ADAPTER])
        a, b = _principal(error, layer.r[ADAPTER], "pissa")
        _set_factors(layer, a * scale**-0.5, b * scale**-0.5)


def dense_weight(layer: nn.Module) -> Tensor:
    """Return a linear layer's matrix, float32 [out, in], dequantised if it is packed."""
    if isinstance(layer, QuantizedLinear):
        return layer.packed.dequantize(torch.float32)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    dequantized: Tensor = dequantize_4bit(weight.data, state)
    return dequantized.float()


def _principal(weight: Tensor, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] of the ``rank`` largest singular values, their roots on both sides."""
    quick = PISSA_ROUNDS.fullmatch(init)
    if quick is None or rank >= min(weight.shape):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(_SEED)
            left, values, right = torch.svd_lowrank(weight, rank, niter=int(quick[1]))
    roots = values[:rank].sqrt()
    return _filled_up((right[:, :rank] * roots).T, left[:, :rank] * roots, rank)


def _orthonormal_rows(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return OLoRA's R [r, in] and Q [out, r]: the first columns of a QR decomposition."""
    q, r = torch.linalg.qr(weight)
    return _filled_up(r[:rank], q[:, :rank], rank)


def _filled_up(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank]. What a small matrix can't fill begins as in plain LoRA, with B zero."""
    missing = rank - a.shape[0]
    if missing > 0:
        rows = torch.empty(missing, a.shape[1], dtype=a.dtype, device=a.device)
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        a, b = torch.cat((a, rows)), nn.functional.pad(b, (0, missing))
    return a.contiguous(), b.contiguous()


def _set_factors(layer: "LoraLayer", a: Tensor, b: Tensor) -> None:
    for factor, values in ((layer.lora_A[ADAPTER].weight, a), (layer.lora_B[ADAPTER].weight, b)):
        factor.copy_(values)
