"""Memory that libraries keep: what the C library holds of what was freed, and the kernels that oneDNN compiles."""

import ctypes
import os

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's; None with another C library."""
KERNELS = 128
"""Compiled kernels that are kept, of about 1 MiB each: a step needs about ten, and others for each number of rows."""


def keep_few_kernels() -> None:
    """Keep oneDNN, and PyTorch's layer over it, from holding 1,024 kernels: one for each shape of a bfloat16 product.

    Call it before the process's first product; a setting in the environment stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))


def give_back() -> None:
    """Let the system have what is free (blocking, some ten milliseconds; from any thread).

    glibc keeps the pages of millions of small pieces, and of large ones once it has seen some: each thread its own.
    """
    if _trim is not None:
        _trim(0)
