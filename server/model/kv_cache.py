"""The KV cache: keys and values of every layer in slots, block size of them a block. It knows no owners."""

import torch
from torch import Tensor

from manylora.server.model.config import ModelConfig
from manylora.server.model.memory import zeros


class KVCache:
    """Keys and values of ``num_blocks`` blocks, [slots, KV heads, head dim] each, per layer."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks * block_size, config.num_kv_heads, config.head_dim)
        # Zeros, not empty: a masked key or value must be finite.
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple(
            (zeros(shape, dtype, device), zeros(shape, dtype, device)) for _ in range(config.num_layers)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return what one block takes in all layers."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize
