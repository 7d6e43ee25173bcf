"""Telling a lack of memory from other errors, on a GPU and on a CPU."""

import torch

_CPU_SIGNS = ("can't allocate memory", "defaultcpuallocator", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory ran out: CUDA's own error, or the CPU allocator's RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _CPU_SIGNS)
