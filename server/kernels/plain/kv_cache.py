"""The plain backend's KV cache: two tensors a layer."""

import torch
from torch import Tensor

from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape


class PlainKVCache:
    """See KVCache. Each layer's keys and values are [slots, KV heads, head dim]."""

    def __init__(
        self, shape: DecoderShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = (num_blocks + 1) * block_size
        size = (2, shape.num_layers, slots, shape.num_kv_heads, shape.head_dim)
        self._data = zeros(size, dtype, device)
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple(
            zip(self._data[0].unbind(), self._data[1].unbind(), strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, the null block's included."""
        return self._data.nbytes

    def finite(self, slots: Tensor) -> Tensor:
        """Say of each slot, int64 [T], whether its keys and values are finite in every layer: bool [T]."""
        # 0 × x is 0 for what is finite and NaN for all else, and adding up keeps that; looking for NaN and infinity
        # element by element takes several times as long.
        found = self._data.index_select(2, slots).mul_(0)
        return found.flatten(3).sum(-1).flatten(0, 1).sum(0) == 0


def bytes_per_block(shape: DecoderShape, block_size: int, dtype: torch.dtype) -> int:
    """Return what one block takes in all layers."""
    return 2 * shape.num_layers * block_size * shape.num_kv_heads * shape.head_dim * dtype.itemsize
