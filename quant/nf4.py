"""NF4, bitsandbytes' 4-bit normal float (QLoRA, 2305.14314, appendix E), equal to it bit for bit.

A weight is flattened row by row and cut into blocks; each block is divided by its largest magnitude (absmax) and
every value becomes the nearest of sixteen. Two codes share a byte, the first in the high half. With double
quantisation the absmax values, less their mean, are quantised to 8 bits in blocks of 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from manylora.quant.dynamic import dequantize_dynamic, quantize_dynamic

BLOCKSIZE = 64
DOUBLE_QUANT = False
"""Whether scales are quantised too where nobody says: one answer for training, serving and merging."""
NESTED_BLOCKSIZE = 256
NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
"""The sixteen values, float32, by code."""
LEAST_ABSMAX = 1e-38
# Values quantised at a time: bounds the scratch memory, and fits a core's cache.
CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Absmax values in 8 bits: value = map[code] · absmax of its block of 256 + offset."""

    codes: Tensor
    """uint8 [blocks]"""
    absmax: Tensor
    """float32 [⌈blocks / 256⌉]"""
    code_map: Tensor
    """float32 [256]"""
    offset: Tensor
    """float32 scalar: the mean of the absmax values."""
    blocksize: int = NESTED_BLOCKSIZE

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.absmax.nbytes + self.code_map.nbytes + self.offset.nbytes

    def expand(self) -> Tensor:
        """Return the absmax values, float32 [blocks]."""
        return dequantize_dynamic(self.codes, self.absmax, self.code_map, self.blocksize) + self.offset

    def to(self, device: torch.device) -> "NestedScales":
        """Return the same scales on ``device``."""
        codes, absmax, code_map, offset = (
            tensor.to(device) for tensor in (self.codes, self.absmax, self.code_map, self.offset)
        )
        return NestedScales(codes, absmax, code_map, offset, self.blocksize)


@dataclass(frozen=True, slots=True)
class Nf4Tensor:
    """A matrix in NF4."""

    codes: Tensor
    """uint8 [⌈out · in / 2⌉]"""
    absmax: Tensor | NestedScales
    """float32 [⌈out · in / blocksize⌉], or the same in 8 bits."""
    shape: tuple[int, int]
    blocksize: int = BLOCKSIZE

    format: ClassVar[str] = "nf4"
    is_quantized: ClassVar[bool] = True

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits held for each weight, scales included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def scales(self) -> Tensor:
        """Return the absmax of every block, float32."""
        return self.absmax.expand() if isinstance(self.absmax, NestedScales) else self.absmax

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix: code value × absmax in float32, rounded to ``dtype`` once."""
        count = self.shape[0] * self.shape[1]
        # Both values of a byte are looked up at once.
        pairs = _pair_table(self.codes.device)
        values = pairs.index_select(0, self.codes.view(-1).int()).view(-1)
        if count % self.blocksize:
            scales = self.scales().repeat_interleave(self.blocksize)[:count]
            return values[:count].mul_(scales).view(self.shape).to(dtype)
        out = torch.empty(count // self.blocksize, self.blocksize, dtype=dtype, device=values.device)
        return torch.mul(values.view(out.shape), self.scales()[:, None], out=out).view(self.shape)

    def to(self, device: torch.device) -> Self:
        """Return the same matrix on ``device``."""
        return replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device))


def quantize_nf4(weight: Tensor, blocksize: int = BLOCKSIZE, double_quant: bool = False) -> Nf4Tensor:
    """Quantise a 16- or 32-bit matrix [out, in]; non-finite values raise ValueError."""
    if weight.dim() != 2:
        raise ValueError(f"NF4 takes a matrix, not {weight.dim()} dimensions")
    flat = weight.reshape(-1)
    codes, absmax = [], []
    step = CHUNK // blocksize * blocksize
    for first in range(0, flat.numel(), step):
        chunk_codes, chunk_absmax = _quantize_chunk(flat[first : first + step].float(), blocksize)
        codes.append(chunk_codes)
        absmax.append(chunk_absmax)
    scales = torch.cat(absmax)
    if not torch.isfinite(scales).all():
        raise ValueError("the weight holds NaN or infinite values")
    nested = nest_scales(scales) if double_quant else scales
    return Nf4Tensor(torch.cat(codes), nested, (weight.shape[0], weight.shape[1]), blocksize)


def stack_rows(parts: Sequence[Nf4Tensor]) -> Nf4Tensor:
    """Stack matrices along out_features. Each part must fill its last block; nested scales are expanded."""
    first = parts[0]
    if any(
        part.shape[0] * part.shape[1] % part.blocksize or part.blocksize != first.blocksize for part in parts
    ):
        raise ValueError("only matrices of whole blocks of one size can be stacked")
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    codes = torch.cat([part.codes.view(-1) for part in parts])
    return Nf4Tensor(codes, torch.cat([part.scales() for part in parts]), shape, first.blocksize)


def _quantize_chunk(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1)
    # As bitsandbytes: multiply by the reciprocal, but divide in an unfilled last block, whose absmax is never 0.
    scaled = padded * (1.0 / absmax.clamp(min=LEAST_ABSMAX))[:, None]
    if count % blocksize:
        absmax[-1].clamp_(min=LEAST_ABSMAX)
        scaled[-1] = padded[-1] / absmax[-1]
    scaled = torch.nn.functional.pad(scaled.view(-1)[:count].clamp_(-1, 1), (0, count % 2))
    codes = torch.bucketize(scaled, _midpoints(values.device)).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def _midpoints(device: torch.device) -> Tensor:
    code = NF4_CODE.to(device)
    return (code[1:] + code[:-1]) / 2


@cache
def _pair_table(device: torch.device) -> Tensor:
    """Return both values of each byte, float32 [256, 2]; kept: to make it is a transfer that a GPU waits for."""
    with torch.inference_mode(mode=False):
        code = NF4_CODE.to(device)
        both = torch.arange(256, device=device)
        return torch.stack((code[both >> 4], code[both & 15]), dim=1)


def nest_scales(absmax: Tensor) -> NestedScales:
    """Quantise absmax values, float32 [blocks], to 8 bits in blocks of NESTED_BLOCKSIZE."""
    offset = absmax.mean()
    codes, nested, code_map = quantize_dynamic(absmax - offset, NESTED_BLOCKSIZE)
    return NestedScales(codes, nested, code_map, offset)
