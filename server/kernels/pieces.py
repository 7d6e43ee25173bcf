"""Cuts what is copied in an arena into pieces, so that a step waits for one of them at most."""

from collections.abc import Iterator

PIECE_BYTES = 1 << 20
"""Of a piece: some hundred microseconds."""


def pieces(count: int, nbytes: int) -> Iterator[slice]:
    """Yield ``count`` things that have ``nbytes`` together in slices of PIECE_BYTES at most, or of one thing."""
    each = max(1, PIECE_BYTES * count // max(1, nbytes))
    for start in range(0, count, each):
        yield slice(start, min(count, start + each))


def moved(count: int, nbytes: int, *, down: bool) -> Iterator[slice]:
    """Yield the slices in the order in which they are copied to a lower place (or a higher one) that they overlap."""
    cut = pieces(count, nbytes)
    return cut if down else reversed(list(cut))
