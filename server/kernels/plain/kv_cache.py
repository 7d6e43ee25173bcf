"""The plain backend's KV cache: keys and values of each layer, in a floating-point type or in 8 bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.server.kernels.plain.kv_int8 import dequantize_kv, groups_of, quantize_kv
from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape


@dataclass(frozen=True, slots=True)
class CachedRows:
    """Keys or values of a layer, a row for each slot."""

    data: Tensor
    """[slots, KV heads, head dim]: values, or int8 codes."""
    scales: Tensor | None = None
    """Of codes: see quantize_kv."""

    def of_heads(self, kept: slice) -> "CachedRows":
        """Return the rows' parts of some KV heads."""
        return CachedRows(self.data[:, kept], None if self.scales is None else self.scales[:, kept])

    def gather(self, slots: Tensor) -> Tensor:
        """Return the values of ``slots``, int64 [n]: [n, KV heads, head dim]."""
        data = self.data.index_select(0, slots)
        return data if self.scales is None else dequantize_kv(data, self.scales.index_select(0, slots))

    def write(self, slots: Tensor, values: Tensor) -> None:
        """Put ``values`` [n, KV heads, head dim] to ``slots``, int64 [n]."""
        if self.scales is None:
            self.data.index_copy_(0, slots, values.to(self.data.dtype))
            return
        codes, scales = quantize_kv(values)
        self.data.index_copy_(0, slots, codes)
        self.scales.index_copy_(0, slots, scales)


class PlainKVCache:
    """See KVCache. ``layers`` are each layer's keys and values; ``dtype`` is int8 or a floating-point type."""

    def __init__(
        self, shape: DecoderShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = (num_blocks + 1) * block_size
        rows = (2, shape.num_layers, slots, shape.num_kv_heads)
        self._data = zeros((*rows, shape.head_dim), dtype, device)
        self._scales: Tensor | None = None
        if dtype == torch.int8:
            self._scales = zeros((*rows, groups_of(shape.head_dim)), torch.bfloat16, device)
        self.layers = tuple((self._rows(0, layer), self._rows(1, layer)) for layer in range(shape.num_layers))

    def _rows(self, half: int, layer: int) -> CachedRows:
        scales = None if self._scales is None else self._scales[half, layer]
        return CachedRows(self._data[half, layer], scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, the null block's included."""
        return self._data.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def finite(self, slots: Tensor) -> Tensor:
        """Say of each slot, int64 [T], whether its keys and values are finite in every layer: bool [T]."""
        # 0 × x is 0 for what is finite and NaN for all else, and adding up keeps that; looking for NaN and infinity
        # element by element takes several times as long. Of codes the scale says it.
        said = self._data if self._scales is None else self._scales
        found = said.index_select(2, slots).mul_(0)
        return found.flatten(3).sum(-1).flatten(0, 1).sum(0) == 0


def bytes_per_block(shape: DecoderShape, block_size: int, dtype: torch.dtype) -> int:
    """Return what one block takes in all layers."""
    row = shape.head_dim * dtype.itemsize
    if dtype == torch.int8:
        row += groups_of(shape.head_dim) * torch.bfloat16.itemsize
    return 2 * shape.num_layers * block_size * shape.num_kv_heads * row
