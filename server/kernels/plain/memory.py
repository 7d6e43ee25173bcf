"""Zeroed device memory that takes room only once it is written to, where the device can do that."""

import math
import mmap

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes of a cache line, where torch's own allocations begin too."""
LARGE = 4 << 20
"""Bytes from which on large pages are asked for: they take more room, and fewer look-ups. numpy does so too."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On a CPU the pages become resident when they are first written.

    torch.zeros writes every page at once, and numpy's does in memory that was used before and freed, so a KV cache or
    an arena sized for the busiest hour would take its memory at start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(pages, dtype=np.uint8)).view(dtype).view(shape)
