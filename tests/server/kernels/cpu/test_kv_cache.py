"""The KV cache takes memory as it fills: a block's keys and values of all layers lie together."""

import pytest
import torch

from manylora.loadtest.material.random_model import named_config
from manylora.server.kernels.cpu.kv_cache import CpuKVCache, bytes_per_block
from manylora.server.kernels.cpu.memory import LARGE_PAGE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_first_tokens_take_few_large_pages(dtype: torch.dtype) -> None:
    """Were each layer's keys apart, the first block alone would take two pages for each layer."""
    shape = named_config("qwen2.5-0.5b").shape
    kv = CpuKVCache(shape, 2000, 16, dtype)
    each = bytes_per_block(shape, 16, dtype)
    assert kv.data.shape[:3] == (2001, shape.num_layers, 2)
    assert kv.data[0].nbytes == kv.data.stride(0) == each, "nothing of another block lies between"
    assert kv.nbytes == 2001 * each
    assert 10 * each < 2 * LARGE_PAGE
