"""Which rank rows of an arena hold no factors but what is done to a module's own output: gains and offsets.

An adapter that scales a module's output (DoRA) owns one row more of it than its rank, and one that shifts it (trained
biases) another: the last of its range, the offset before the gain. B holds them there, and A nothing. So they are
allocated, moved and let go with the factors, and whoever does that knows no kinds.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.server.kernels.step import AdapterRanges, RankRange


class OutputRows:
    """Row numbers by module. Changed with the arena."""

    def __init__(self, modules: Iterable[str]) -> None:
        names = tuple(modules)
        self._gains: dict[str, set[int]] = {module: set() for module in names}
        self._offsets: dict[str, set[int]] = {module: set() for module in names}
        self.changes = 0
        """Grows with each change: what was derived of these rows before may be wrong then."""

    def __bool__(self) -> bool:
        return any(self._gains.values()) or any(self._offsets.values())

    def written(self, ranges: AdapterRanges, weights: AdapterWeights) -> None:
        """Note what ranges hold once ``weights`` are written to them."""
        gained, shifted = (
            {path.rsplit(".", 1)[-1] for path in each} for each in (weights.gains, weights.offsets)
        )
        for module, owned in ranges.items():
            last = owned.start + owned.rank - 1
            for rows in (self._gains[module], self._offsets[module]):
                rows.difference_update(_rows(owned))
            if module in gained:
                self._gains[module].add(last)
            if module in shifted:
                self._offsets[module].add(last - (module in gained))
        self.changes += 1

    def moved(self, module: str, source: RankRange, target_start: int) -> None:
        """Note that rows were moved; the ranges may overlap."""
        for rows in (self._gains[module], self._offsets[module]):
            moved = {row - source.start + target_start for row in rows.intersection(_rows(source))}
            rows.difference_update(_rows(source), _rows(RankRange(target_start, source.rank)))
            rows.update(moved)
        self.changes += 1

    def gain(self, module: str, owned: RankRange) -> int | None:
        """Return the row of a range that holds gains, if one does."""
        last = owned.start + owned.rank - 1
        return last if last in self._gains[module] else None

    def offset(self, module: str, owned: RankRange) -> int | None:
        """Return the row of a range that holds offsets, if one does."""
        row = owned.start + owned.rank - 1 - (self.gain(module, owned) is not None)
        return row if row in self._offsets[module] and row >= owned.start else None

    def factors(self, module: str, owned: RankRange) -> RankRange:
        """Return the rows of a range that hold factors; there may be none."""
        others = (self.gain(module, owned), self.offset(module, owned))
        more = sum(row is not None for row in others)
        return RankRange(owned.start, owned.rank - more) if more else owned


def outputs_of(
    rows: OutputRows, module: str, owned: RankRange, path: str, weights: AdapterWeights
) -> Iterator[tuple[int, Tensor]]:
    """Yield what a layer's rows of a range hold beside factors, once ``rows`` knows of it: (row, float32 [out])."""
    for row, values in (
        (rows.gain(module, owned), weights.gains.get(path)),
        (rows.offset(module, owned), weights.offsets.get(path)),
    ):
        if row is not None and values is not None:
            yield row, values


def _rows(owned: RankRange) -> range:
    return range(owned.start, owned.start + owned.rank)
