"""Zeroed device memory that takes room only once it is written to, where the device can do that."""

import math

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes of a cache line, where torch's own allocations begin too."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. On a CPU the pages become resident when they are first written.

    torch.zeros writes every page at once, so a KV cache sized for the busiest hour would take its memory at start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)
