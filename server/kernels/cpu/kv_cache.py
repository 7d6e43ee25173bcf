"""The native backend's KV cache: bfloat16, or 8 bits with scales; one buffer for all layers."""

import ctypes

import torch

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.plain.kv_int8 import groups_of
from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape

FORMS = {torch.bfloat16: abi.KV_BF16, torch.int8: abi.KV_INT8}
"""The types in which keys and values can be kept."""
LINE = 64
"""Bytes: an int8 block takes whole ones."""


class CpuKVCache:
    """See KVCache. uint8 [blocks, layers, keys and values, bytes of one]: native/kv_cache.h says how these lie.

    What a block has in all layers lies together: so new blocks take one large page after the other. Were each layer's
    apart, a block might be the first in a new page of all of them, and the system fills a page with zeros first: 2 ms.
    """

    def __init__(self, shape: DecoderShape, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        blocks = num_blocks + 1
        size = (blocks, shape.num_layers, 2, _bytes_in_half(shape, block_size, dtype))
        self.data = zeros(size, torch.uint8, torch.device("cpu"))
        self.structure = abi.KV(
            data=self.data.data_ptr(), slots=blocks * block_size, block_size=block_size, form=FORMS[dtype]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, the null block's included."""
        return self.data.nbytes

    @property
    def address(self) -> int:
        """Of the structure that kernels read."""
        return ctypes.addressof(self.structure)


def bytes_per_block(shape: DecoderShape, block_size: int, dtype: torch.dtype) -> int:
    """Return what one block takes in all layers."""
    return 2 * shape.num_layers * _bytes_in_half(shape, block_size, dtype)


def _bytes_in_half(shape: DecoderShape, block_size: int, dtype: torch.dtype) -> int:
    """Return what a block takes in a layer's keys, or its values."""
    rows = block_size * shape.num_kv_heads
    if dtype == torch.bfloat16:
        return rows * shape.head_dim * dtype.itemsize
    return -(-rows * (shape.head_dim + 2 * groups_of(shape.head_dim)) // LINE) * LINE
