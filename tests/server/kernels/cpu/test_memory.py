"""Memory of packed weights."""

import gc

import pytest
import torch

from manylora.server.kernels.cpu.memory import CHUNK, LARGE_PAGE, LINE, WeightMemory


def test_tensors_lie_one_after_the_other_on_lines_of_their_own() -> None:
    memory = WeightMemory()
    first = memory.empty((100,), torch.uint8)
    second = memory.empty((3, 5), torch.float16)
    third = memory.empty((64,), torch.int16)
    assert first.data_ptr() % LARGE_PAGE == 0
    assert second.data_ptr() == first.data_ptr() + 2 * LINE
    assert third.data_ptr() == second.data_ptr() + LINE
    assert second.shape == (3, 5)
    assert third.dtype == torch.int16
    first.fill_(1), second.fill_(2.0), third.fill_(3)
    assert first.eq(1).all()
    assert second.eq(2.0).all()


def test_what_does_not_fit_the_chunk_has_one_of_its_own() -> None:
    memory = WeightMemory()
    small = memory.empty((1,), torch.uint8)
    large = memory.empty((CHUNK + 1,), torch.uint8)
    assert large.data_ptr() % LARGE_PAGE == 0
    assert not small.data_ptr() <= large.data_ptr() < small.data_ptr() + CHUNK
    large[-1] = 1


def test_memory_outlives_the_one_that_gave_it_as_long_as_it_is_used() -> None:
    kept = WeightMemory().empty((1000,), torch.int16)
    kept.fill_(7)
    gc.collect()
    assert kept.eq(7).all()


def test_nothing_is_a_tensor_too() -> None:
    assert WeightMemory().empty((0, 32), torch.float16).shape == (0, 32)


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="packed weights"):
        WeightMemory().empty((1 << 60,), torch.uint8)
