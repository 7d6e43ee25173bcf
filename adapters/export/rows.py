"""Matrices that are read a few rows at a time in float32, whatever they are stored in: what keeps memory flat.

A merge walks over a matrix in chunks of rows, so that no float32 copy of all of it ever exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manylora.quant.awq import AwqTensor
from manylora.quant.gptq import GptqTensor
from manylora.quant.nf4 import NestedScales, Nf4Tensor

CHUNK_WEIGHTS = 1 << 22
"""Weights of one chunk: 16 MiB in float32."""
ROW_STEP = 64
"""Chunks begin at multiples of it: there, blocks of NF4 and words of GPTQ and AWQ begin too."""


class Rows(Protocol):
    """A matrix [out, in] or a vector [out]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) in float32; ``first`` is a multiple of ROW_STEP."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """Return the rows at ``indices`` (int64 [n]) in float32, for embeddings."""
        ...


def chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) over the rows of a tensor of ``shape``, CHUNK_WEIGHTS at a time."""
    wide = 1
    for size in shape[1:]:
        wide *= size
    step = max(ROW_STEP, CHUNK_WEIGHTS // max(1, wide) // ROW_STEP * ROW_STEP)
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


@dataclass(frozen=True, slots=True)
class DenseRows:
    """A tensor that is held as it is."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.weight.shape)

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows in float32."""
        return self.weight[first:last].float()

    def take(self, indices: Tensor) -> Tensor:
        """Return some rows in float32."""
        return self.weight[indices].float()


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A quantised matrix, dequantised chunk by chunk."""

    matrix: Nf4Tensor | GptqTensor | AwqTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.matrix.shape

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows in float32."""
        matrix = self.matrix
        if isinstance(matrix, Nf4Tensor) and first * matrix.shape[1] % matrix.blocksize:
            return matrix.dequantize(torch.float32)[first:last]  # no block begins there
        return _slice(matrix, first, last).dequantize(torch.float32)

    def take(self, indices: Tensor) -> Tensor:
        """Return some rows in float32; dequantises all of it, for no embedding is quantised."""
        return self.matrix.dequantize(torch.float32)[indices]


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """Another matrix's rows as they are once rounded to ``dtype``."""

    source: Rows
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.source.shape

    def rows(self, first: int, last: int) -> Tensor:
        """Return rounded rows in float32."""
        return self.source.rows(first, last).to(self.dtype).float()

    def take(self, indices: Tensor) -> Tensor:
        """Return some rounded rows in float32."""
        return self.source.take(indices).to(self.dtype).float()


def _slice(
    matrix: Nf4Tensor | GptqTensor | AwqTensor, first: int, last: int
) -> Nf4Tensor | GptqTensor | AwqTensor:
    if isinstance(matrix, Nf4Tensor):
        return _nf4_slice(matrix, first, last)
    if isinstance(matrix, AwqTensor):
        words = slice(first // 8, -(-last // 8))
        return AwqTensor(matrix.qweight[:, words], matrix.qzeros[:, words], matrix.scales[:, first:last])
    per_word = 32 // matrix.bits
    zeros = matrix.qzeros[:, first // per_word : -(-last // per_word)]
    return GptqTensor(
        matrix.qweight[:, first:last],
        zeros,
        matrix.scales[:, first:last],
        matrix.g_idx,
        matrix.bits,
        matrix.zero_offset,
    )


def _nf4_slice(matrix: Nf4Tensor, first: int, last: int) -> Nf4Tensor:
    wide, size = matrix.shape[1], matrix.blocksize
    begin, end = first * wide, last * wide
    blocks = slice(begin // size, -(-end // size))
    absmax = matrix.absmax
    absmax = _nested_slice(absmax, blocks) if isinstance(absmax, NestedScales) else absmax[blocks]
    return Nf4Tensor(matrix.codes[begin // 2 : -(-end // 2)], absmax, (last - first, wide), size)


def _nested_slice(scales: NestedScales, blocks: slice) -> Tensor:
    codes = scales.codes.view(-1)[blocks].int()
    index = torch.arange(blocks.start, blocks.start + codes.numel()) // scales.blocksize
    return scales.code_map[codes] * scales.absmax[index] + scales.offset
