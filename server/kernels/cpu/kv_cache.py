"""The native backend's KV cache: bfloat16, one buffer for all layers."""

import ctypes

import torch

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape


class CpuKVCache:
    """See KVCache. bfloat16 [layers, keys and values, slots, KV heads, head dim]."""

    def __init__(self, shape: DecoderShape, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        slots = (num_blocks + 1) * block_size
        size = (shape.num_layers, 2, slots, shape.num_kv_heads, shape.head_dim)
        self.data = zeros(size, torch.bfloat16, torch.device("cpu"))
        self.structure = abi.KV(data=self.data.data_ptr(), slots=slots, block_size=block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, the null block's included."""
        return self.data.nbytes

    @property
    def address(self) -> int:
        """Of the structure that kernels read."""
        return ctypes.addressof(self.structure)
