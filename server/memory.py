"""Memory that was freed and that the C library keeps: given back to the system."""

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's; None with another C library."""


def give_back() -> None:
    """Let the system have what is free (blocking, some ten milliseconds; from any thread).

    glibc keeps the pages of millions of small pieces, and of large ones once it has seen some: each thread its own.
    """
    if _trim is not None:
        _trim(0)
