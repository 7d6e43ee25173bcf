"""The KV cache: keys and values of every layer in slots, block size of them a block. It knows no owners.

Block 0 is the null block, which is nobody's: those that sequences own are numbered from 1.
"""

import torch
from torch import Tensor

from manylora.server.model.config import ModelConfig
from manylora.server.model.memory import zeros


class KVCache:
    """Keys and values of ``num_blocks`` blocks and the null block, [slots, KV heads, head dim] each, per layer."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = (num_blocks + 1) * block_size
        shape = (2, config.num_layers, slots, config.num_kv_heads, config.head_dim)
        self._data = zeros(shape, dtype, device)
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


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return what one block takes in all layers."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize
