"""Pools are as large as the busiest hour needs, and take memory only for what is used."""

import psutil
import torch

from manylora.server.kernels.plain.memory import ALIGNMENT, zeros
from manylora.server.memory import give_back

MIB = 1 << 20


def test_memory_becomes_resident_when_it_is_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = zeros((256, 1024, 1024), torch.bfloat16, torch.device("cpu"))
    assert pool.nbytes == 512 * MIB
    assert process.memory_info().rss - before < 64 * MIB
    pool[7].fill_(1)
    assert float(pool[6:9].float().sum()) == MIB


def test_pieces_do_so_too_where_memory_was_freed_before() -> None:
    first = torch.ones(6 * MIB)
    del first  # pieces of its size come from one heap from now on
    used = [torch.ones(MIB // 4) for _ in range(160)]
    del used[:-1]
    give_back()
    process = psutil.Process()
    before = process.memory_info().rss
    pools = [zeros((256, 896), torch.bfloat16, torch.device("cpu")) for _ in range(256)]
    assert sum(pool.nbytes for pool in pools) == 112 * MIB
    assert process.memory_info().rss - before < 16 * MIB


def test_zeros_of_any_shape_and_type_begin_at_a_cache_line() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pool = zeros((3, 5, 7), dtype, torch.device("cpu"))
        assert (pool.shape, pool.dtype, pool.data_ptr() % ALIGNMENT) == ((3, 5, 7), dtype, 0)
        assert pool.is_contiguous()
        assert not pool.any()
