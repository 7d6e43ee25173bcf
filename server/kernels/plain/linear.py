"""Linear weights of the plain backend: 16/32-bit, dequantised at use, or bitsandbytes' fused NF4 kernel."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.quant.nf4 import NF4_CODE, Nf4Tensor, stack_rows
from manylora.server.kernels.backend import WeightSource

PIECE = 1 << 21
"""Weights of a piece of rows: 8 MiB."""
PACKED_ROWS = 32
"""Output rows that bitsandbytes' kernel packs together."""


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A matrix that is held as it is used."""

    weight: Tensor
    """[out, in]"""
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weight.nbytes

    def rows(self, first: int, last: int) -> Iterator[Tensor]:
        """See Backend."""
        yield from _pieces(self.weight[first:last])

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class DequantizedLinear:
    """4-bit parts, each dequantised for its product and let go: exact, and as slow as that is."""

    parts: tuple[WeightSource, ...]
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts)

    def rows(self, first: int, last: int) -> Iterator[Tensor]:
        """See Backend. Takes one of the parts at a time in ``dtype``, as a product does."""
        start = 0
        for part in self.parts:
            begin, end = max(first - start, 0), min(last - start, part.shape[0])
            if begin < end:
                yield from _pieces(part.dequantize(self.dtype)[begin:end])
            start += part.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        outs = [F.linear(x, part.dequantize(self.dtype)) for part in self.parts]
        y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class FusedNf4Linear:
    """NF4 through bitsandbytes' AVX-512 BF16 kernel, which never writes the dequantised matrix.

    Scales are rounded to bfloat16, as bitsandbytes does there; a row's bits don't depend on the batch.
    """

    packed: Tensor
    """uint8 [out, in / 2] in the kernel's own order."""
    scales: Tensor
    """bfloat16 [in / blocksize, out]"""
    code: Tensor
    blocksize: int
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.packed.nbytes + self.scales.nbytes

    def rows(self, first: int, last: int) -> Iterator[Tensor]:
        """See Backend."""
        wide = self.shape[1]
        step = max(1, PIECE // (PACKED_ROWS * wide)) * PACKED_ROWS
        for begin in range(first // PACKED_ROWS * PACKED_ROWS, last, step):
            end = min(begin + step, -(-last // PACKED_ROWS) * PACKED_ROWS)
            packed = self.packed[begin:end].view(-1, wide // 2, PACKED_ROWS)
            pairs = torch.stack((packed & 15, packed >> 4), dim=2).view(-1, wide // 2, PACKED_ROWS, 2)
            values = self.code[pairs.transpose(1, 2).reshape(-1, wide).long()]
            found = values * self.scales[:, begin:end].T.float().repeat_interleave(self.blocksize, dim=1)
            yield found[max(0, first - begin) : last - begin]

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply."""
        y: Tensor = torch.ops.bitsandbytes.gemv_4bit(
            x, self.packed, self.shape, self.scales, self.code, self.blocksize
        )
        return y if self.bias is None else y.add_(self.bias)


PlainLinear: TypeAlias = DenseLinear | DequantizedLinear | FusedNf4Linear
"""y = x Wᵀ + bias for x [T, in] in the backend's dtype; returns [T, out], freshly allocated."""


def _pieces(matrix: Tensor) -> Iterator[Tensor]:
    """Yield some rows after the other, in float32."""
    for piece in torch.split(matrix, max(1, PIECE // matrix.shape[1])):
        yield piece.float()


def fuse_nf4(parts: Sequence[Nf4Tensor], bias: Tensor | None) -> FusedNf4Linear:
    """Pack NF4 parts, stacked along out_features, for bitsandbytes' kernel.

    The kernel takes rows in groups of 32: pairs of codes (along in) of the 32 rows lie side by side, and of each
    64 codes so arranged the first 32 are the low and the last 32 the high halves of 32 bytes.
    """
    codes = torch.cat([_codes(part) for part in parts])
    rows, columns = codes.shape
    grouped = codes.view(rows // PACKED_ROWS, PACKED_ROWS, columns // 2, 2).transpose(1, 2)
    low, high = grouped.reshape(-1, 2, PACKED_ROWS).unbind(1)
    blocksize = parts[0].blocksize
    scales = torch.cat([part.scales().view(part.shape[0], -1) for part in parts])
    return FusedNf4Linear(
        (high << 4 | low).view(rows, columns // 2).contiguous(),
        scales.T.to(torch.bfloat16).contiguous(),
        NF4_CODE.clone(),
        blocksize,
        bias,
    )


def stacked(parts: Sequence[WeightSource]) -> Sequence[WeightSource]:
    """Return the parts as one where they are NF4 and no scale is of two of them: dequantised at once, for a GPU."""
    nf4 = [part for part in parts if isinstance(part, Nf4Tensor) and isinstance(part.absmax, Tensor)]
    if len(nf4) < max(2, len(parts)) or any(part.shape[0] * part.shape[1] % part.blocksize for part in nf4):
        return parts
    same = all(part.blocksize == nf4[0].blocksize for part in nf4)
    return [stack_rows(nf4)] if same else parts


def can_fuse_nf4(parts: Sequence[WeightSource]) -> bool:
    """Whether the parts are NF4 in shapes that bitsandbytes' kernel takes."""
    return all(
        isinstance(part, Nf4Tensor)
        and part.shape[0] % PACKED_ROWS == 0
        and part.shape[1] % part.blocksize == 0
        for part in parts
    )


def _codes(part: Nf4Tensor) -> Tensor:
    """Return one code per byte, uint8 [out, in]."""
    packed = part.codes.view(-1)
    return torch.stack((packed >> 4, packed & 15), dim=1).view(part.shape)


def fused_nf4_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if bitsandbytes' fused kernel can be used, else the reason why not."""
    if device.type != "cpu":
        return "it is for CPUs"
    if dtype is not torch.bfloat16:
        return "it computes in bfloat16"
    # bitsandbytes looks for an optional kernel package at import and warns that it isn't there; so be it.
    quieted = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = quieted.level
    quieted.setLevel(logging.ERROR)
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return "bitsandbytes is not installed"
    finally:
        quieted.setLevel(level)
    return None if has_avx512bf16() else "the processor has no AVX-512 BF16"
