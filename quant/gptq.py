"""GPTQ checkpoints (2210.17323) in AutoGPTQ's layout: w = scale[g] · (q − zero[g]), 4 or 8 bits.

``qweight`` int32 [in · bits / 32, out] packs codes along in; ``qzeros`` int32 [groups, out · bits / 32] along out,
stored minus one in format "gptq", as they are in "gptq_v2"; ``scales`` [groups, out]; ``g_idx`` int32 [in] names
each input's group, which with desc_act is not its position's.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from manylora.quant.packing import pack, unpack


@dataclass(frozen=True, slots=True)
class GptqTensor:
    """A matrix as a GPTQ checkpoint holds it."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int
    zero_offset: int
    """What was subtracted from zero points before they were packed: 1 in "gptq", 0 in "gptq_v2"."""

    format: ClassVar[str] = "gptq"
    is_quantized: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.qweight.shape[1], self.qweight.shape[0] * 32 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.qweight, self.qzeros, self.scales, self.g_idx))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix: (q − zero) · scale in float32, rounded to ``dtype`` once."""
        codes = unpack(self.qweight, self.bits, 0)
        groups = self.g_idx.long()
        weight = (codes.float() - self.zero_points().float()[groups]).mul_(self.scales.float()[groups])
        return weight.T.to(dtype).contiguous()

    def zero_points(self) -> Tensor:
        """Return each group's zero points, int32 [groups, out]."""
        # Stored zero points wrap: 2**bits − 1 plus one is zero again.
        return (unpack(self.qzeros, self.bits, 1).int() + self.zero_offset) % (1 << self.bits)

    def to(self, device: torch.device) -> Self:
        """Return the same matrix on ``device``."""
        return replace(
            self,
            qweight=self.qweight.to(device),
            qzeros=self.qzeros.to(device),
            scales=self.scales.to(device),
            g_idx=self.g_idx.to(device),
        )


def pack_gptq(
    codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int = 4, zero_offset: int = 1
) -> GptqTensor:
    """Pack codes uint8 [in, out], zeros uint8 [groups, out], scales [groups, out] and g_idx [in]."""
    stored = (zeros.int() - zero_offset) % (1 << bits)
    return GptqTensor(pack(codes, bits, 0), pack(stored, bits, 1), scales, g_idx.int(), bits, zero_offset)


def quantize_gptq_nearest(weight: Tensor, group_size: int = 128, bits: int = 4) -> GptqTensor:
    """Round a matrix [out, in] to the nearest codes, asymmetric per group: GPTQ's format without its search."""
    out, wide = weight.shape
    size = wide if group_size == -1 else group_size
    groups = weight.float().T.reshape(wide // size, size, out)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    most = (1 << bits) - 1
    # The zero point must survive "minus one": keep it above zero.
    scales = ((high - low) / most).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(1, most)
    codes = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, most).reshape(wide, out)
    g_idx = torch.arange(wide) // size
    return pack_gptq(codes.to(torch.uint8), zeros.to(torch.uint8), scales, g_idx, bits)
