"""AWQ checkpoints (2306.00978), AutoAWQ's GEMM layout: w = scale[g] · (q − zero[g]), 4 bits.

``qweight`` int32 [in, out / 8] packs eight codes along out, in the order 0 2 4 6 1 3 5 7 from the lowest bits;
``qzeros`` int32 [groups, out / 8] the same way; ``scales`` [groups, out].
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from manylora.quant.packing import pack, unpack

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns lies at each place of a word, lowest bits first."""


@dataclass(frozen=True, slots=True)
class AwqTensor:
    """A matrix as an AWQ checkpoint holds it."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    format: ClassVar[str] = "awq"
    is_quantized: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.qweight.shape[1] * 8, self.qweight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.qweight.nbytes + self.qzeros.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix: (q − zero) · scale in float32, rounded to ``dtype`` once."""
        codes, zeros = _columns(self.qweight).float(), self.zero_points().float()
        size = codes.shape[0] // zeros.shape[0]
        weight = (codes.view(-1, size, codes.shape[1]) - zeros[:, None]).mul_(self.scales.float()[:, None])
        return weight.flatten(0, 1).T.to(dtype).contiguous()

    def zero_points(self) -> Tensor:
        """Return each group's zero points, uint8 [groups, out]."""
        return _columns(self.qzeros)

    def to(self, device: torch.device) -> Self:
        """Return the same matrix on ``device``."""
        return replace(
            self,
            qweight=self.qweight.to(device),
            qzeros=self.qzeros.to(device),
            scales=self.scales.to(device),
        )


def pack_awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> AwqTensor:
    """Pack codes uint8 [in, out], zeros uint8 [groups, out] and scales [groups, out]."""
    return AwqTensor(_words(codes), _words(zeros), scales)


def _columns(words: Tensor) -> Tensor:
    """Return the codes in their columns' order, uint8 [rows, out]."""
    places = torch.unflatten(unpack(words, BITS, 1), 1, (-1, 8))
    return places[..., _order(words.device)].flatten(1)


@cache
def _order(device: torch.device) -> Tensor:
    """Return where each column's code is among eight; kept: to make it is a transfer, which a GPU waits for."""
    with torch.inference_mode(mode=False):
        return torch.tensor(ORDER, device=device).argsort()


def _words(codes: Tensor) -> Tensor:
    return pack(torch.unflatten(codes, 1, (-1, 8))[..., list(ORDER)].flatten(1), BITS, 1)
