"""Memory for packed weights: large pages where the system has them.

A step reads all weights once. In pages of 4 KiB that lie anywhere, one processor core then gets about two thirds of
what it gets from pages of 2 MiB: what is read ahead ends at a page's end, and every page is looked up anew.
"""

from threading import Lock

import torch
from torch import Tensor

from manylora.server.kernels.plain.memory import zeros

LARGE_PAGE = 2 << 20
CHUNK = 32 << 20
"""Bytes that are asked for at a time. What isn't written yet takes no memory."""
LINE = 64


class WeightMemory:
    """Hands out memory that isn't given back piece by piece: a chunk is freed when nothing in it is used any more."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._chunk: Tensor | None = None
        """uint8: what is left of the last chunk."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that begins on a cache line; its values are undefined. Raises MemoryError."""
        wanted = torch.Size(shape).numel() * dtype.itemsize
        whole = -(-wanted // LINE) * LINE
        if not wanted:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            if self._chunk is None or len(self._chunk) < whole:
                self._chunk = _large_pages(max(whole, CHUNK))
            taken, self._chunk = self._chunk[:wanted], self._chunk[whole:]
        return taken.view(dtype).view(shape)


def _large_pages(count: int) -> Tensor:
    """Map at least ``count`` bytes (CHUNK or more, so that large pages are asked for). Raises MemoryError."""
    whole = -(-count // LARGE_PAGE) * LARGE_PAGE
    try:
        everything = zeros((whole + LARGE_PAGE,), torch.uint8, torch.device("cpu"))
    except OSError as error:
        raise MemoryError(f"no memory for {whole} bytes of packed weights: {error}") from error
    first = -everything.data_ptr() % LARGE_PAGE
    return everything[first : first + whole]
