"""Freed memory goes back to the system: without that, glibc keeps as much again as a merge uses."""

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE = 1 << 20


def return_freed_memory() -> None:
    """Let buffers of a mebibyte and more be returned when they are freed, for the whole process.

    By default glibc raises the limit with each one that is freed, and the rest of the heap fragments around them. Does
    nothing with another C library.
    """
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
    except (OSError, AttributeError):
        return
