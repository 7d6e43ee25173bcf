"""8-bit weights: a scale for each 64 inputs of an output, its largest magnitude over 127, and whole numbers to it.

Half the memory of 16 bits, and next to nothing lost: the error of a weight is at most 1/254 of its group's largest.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
LARGEST = 127
NOTHING = 1e-36
"""A group of no larger magnitude is zero: what it would be multiplied by is none of float32's numbers."""
# Rows quantised at a time: bounds the scratch memory.
CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Int8Tensor:
    """A matrix in 8 bits: weight = code · scale of its group of inputs."""

    codes: Tensor
    """int8 [out, in], within ±LARGEST."""
    scales: Tensor
    """float32 [out, ⌈in / group⌉]"""
    group: int = GROUP

    format: ClassVar[str] = "int8"
    is_quantized: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix: code × scale in float32, rounded to ``dtype`` once."""
        scales = self.scales.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
        return (self.codes * scales).to(dtype)

    def to(self, device: torch.device) -> "Int8Tensor":
        """Return the same matrix on ``device``."""
        return Int8Tensor(self.codes.to(device), self.scales.to(device), self.group)


def quantize_int8(weight: Tensor, group: int = GROUP) -> Int8Tensor:
    """Quantise a 16- or 32-bit matrix [out, in]. Raises ValueError if something in it is not finite."""
    out, wide = weight.shape
    groups = -(-wide // group)
    codes = torch.empty(out, wide, dtype=torch.int8, device=weight.device)
    scales = torch.empty(out, groups, dtype=torch.float32, device=weight.device)
    rows = max(1, CHUNK_WEIGHTS // wide)
    for first in range(0, out, rows):
        part = weight[first : first + rows].float()
        padded = F.pad(part, (0, groups * group - wide)).view(len(part), groups, group)
        largest = padded.abs().amax(-1)
        if not bool(largest.isfinite().all()):
            raise ValueError("a weight is not finite, so it can't be quantised")
        scales[first : first + rows] = largest / LARGEST
        # A group of zeros has no scale to divide by, and needs none.
        inverse = torch.where(largest > NOTHING, LARGEST / largest, 0)
        whole = (padded * inverse[..., None]).round_().clamp_(-LARGEST, LARGEST)
        codes[first : first + rows] = whole.view(len(part), -1)[:, :wide].to(torch.int8)
    return Int8Tensor(codes, scales, group)
