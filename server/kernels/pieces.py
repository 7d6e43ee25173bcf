"""Cuts what is copied in an arena into pieces, so that a step waits for one of them at most."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from manylora.adapters.types import AdapterWeights
from manylora.server.kernels.step import AdapterRanges, RankRange

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


class WholeChanges(ABC):
    """What makes a rank arena's changes in one go of those that it makes in pieces. See RankArena."""

    def write(self, ranges: AdapterRanges, weights: AdapterWeights) -> None:
        """Copy an adapter into its ranges."""
        for _ in self.writing(ranges, weights):
            pass

    def move(self, module: str, source: RankRange, target_start: int) -> None:
        """Move a range to another start; the two may overlap."""
        for _ in self.moving(module, source, target_start):
            pass

    @abstractmethod
    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        """Copy an adapter piece by piece."""

    @abstractmethod
    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        """Move a range piece by piece."""
