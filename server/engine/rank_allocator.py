"""Which rank rows of the arena belong to which adapter, module by module. Integers only; moves no data."""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from manylora.server.kernels.step import AdapterRanges, RankRange


@dataclass(frozen=True, slots=True)
class Move:
    """Rows to be copied to a lower start within one module. Source and target may overlap."""

    module: str
    adapter_id: int
    source: RankRange
    target_start: int


class RankAllocator:
    """Contiguous ranges in each module's ``rows[module]`` rows, first fit."""

    def __init__(self, rows: Mapping[str, int]) -> None:
        self.rows = dict(rows)
        self._owned: dict[str, dict[int, RankRange]] = {module: {} for module in rows}
        self._free = dict(rows)

    def free_rows(self, module: str) -> int:
        """Return the free rows of a module, contiguous or not. Callable from any thread."""
        return self._free[module]

    def fits_empty(self, ranks: Mapping[str, int]) -> bool:
        """Say whether the ranks fit an arena that holds nothing else."""
        return all(rank <= self.rows.get(module, 0) for module, rank in ranks.items())

    def has_rows(self, ranks: Mapping[str, int]) -> bool:
        """Say whether there are enough free rows, contiguous or not."""
        return all(rank <= self.free_rows(module) for module, rank in ranks.items())

    def allocate(self, adapter_id: int, ranks: Mapping[str, int]) -> AdapterRanges:
        """Give the adapter its ranges. There must be room: ask ``has_rows`` and ``plan_compaction`` first."""
        ranges: dict[str, RankRange] = {}
        for module, rank in ranks.items():
            start = self._first_fit(module, rank)
            assert start is not None, f"no {rank} contiguous rows in {module}"
            assert adapter_id not in self._owned[module], "allocated twice"
            ranges[module] = self._owned[module][adapter_id] = RankRange(start, rank)
            self._free[module] -= rank
        return ranges

    def free(self, adapter_id: int) -> int:
        """Take the adapter's ranges back; return how many rows they were."""
        rows = 0
        for module, owned in self._owned.items():
            held = owned.pop(adapter_id, None)
            if held is not None:
                self._free[module] += held.rank
                rows += held.rank
        return rows

    def ranges(self, adapter_id: int) -> AdapterRanges:
        """Return what the adapter owns now."""
        return {m: owned[adapter_id] for m, owned in self._owned.items() if adapter_id in owned}

    def find_gaps(self, adapters: Sequence[Mapping[str, int]], gone: Set[int] = frozenset()) -> bool:
        """Say whether ``allocate`` would find a gap for each of these adapters, one after the other, without a move.

        Ranges of ``gone`` count as free.
        """
        modules = {module for ranks in adapters for module in ranks}
        return all(self._gaps_hold(m, [r[m] for r in adapters if m in r], gone) for m in modules)

    def _gaps_hold(self, module: str, ranks: Sequence[int], gone: Set[int]) -> bool:
        gaps = self._gaps(module, gone)
        for rank in ranks:
            found = next((i for i, (_, size) in enumerate(gaps) if size >= rank), None)
            if found is None:
                return False
            start, size = gaps[found]
            gaps[found] = (start + rank, size - rank)
        return True

    def plan_compaction(self, ranks: Mapping[str, int], gone: Set[int] = frozenset()) -> tuple[Move, ...]:
        """Return moves after which each module has that many rows in one piece, none where it has them now.

        Ranges of ``gone`` count as free. Ordered so that no move overwrites rows still to be moved; a beginning of them
        may be carried out alone. Ask ``has_rows`` first, once those are free.
        """
        return tuple(move for module, rank in ranks.items() for move in self._plan(module, rank, gone))

    def _plan(self, module: str, rank: int, gone: Set[int]) -> list[Move]:
        moves: list[Move] = []
        if self._first_fit(module, rank, gone) is not None:
            return moves
        end = 0
        for adapter_id, held in self._in_order(module, gone):
            # What has been moved so far leaves its rows free before this one.
            if held.start - end >= rank:
                break
            if held.start != end:
                moves.append(Move(module, adapter_id, held, end))
            end += held.rank
        return moves

    def apply(self, moves: tuple[Move, ...]) -> None:
        """Write moves into the books."""
        for move in moves:
            self._owned[move.module][move.adapter_id] = RankRange(move.target_start, move.source.rank)

    def check_integrity(self) -> None:
        """Raise AssertionError if ranges overlap or leave the arena."""
        for module, owned in self._owned.items():
            end = 0
            for held in sorted(owned.values(), key=lambda r: r.start):
                assert held.start >= end, f"ranges overlap in {module}"
                assert held.rank > 0, f"an empty range in {module}"
                end = held.start + held.rank
            assert end <= self.rows[module], f"a range leaves {module}'s rows"
            used = sum(held.rank for held in owned.values())
            assert used + self._free[module] == self.rows[module], f"rows of {module} are lost"

    def _in_order(self, module: str, gone: Set[int]) -> list[tuple[int, RankRange]]:
        owned = ((i, held) for i, held in self._owned[module].items() if i not in gone)
        return sorted(owned, key=lambda item: item[1].start)

    def _gaps(self, module: str, gone: Set[int]) -> list[tuple[int, int]]:
        """Return (start, rows) between the ranges, in order; some of no rows."""
        gaps: list[tuple[int, int]] = []
        end = 0
        for _, held in self._in_order(module, gone):
            gaps.append((end, held.start - end))
            end = held.start + held.rank
        return [*gaps, (end, self.rows[module] - end)]

    def _first_fit(self, module: str, rank: int, gone: Set[int] = frozenset()) -> int | None:
        return next((start for start, size in self._gaps(module, gone) if size >= rank), None)


def adapter_by_adapter(moves: Sequence[Move]) -> tuple[Move, ...]:
    """Return moves such that adapters are whole again one after the other, as early as the order in each module allows.

    Within a module the order stays: there they build on each other. Who is moved late in some module comes late.
    """
    plans: defaultdict[str, list[Move]] = defaultdict(list)
    places: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for move in moves:
        places[move.adapter_id][move.module] = len(plans[move.module])
        plans[move.module].append(move)
    ordered: list[Move] = []
    begun = dict.fromkeys(plans, 0)
    for adapter_id in sorted(places, key=lambda each: max(places[each].values())):
        for module, place in places[adapter_id].items():
            ordered += plans[module][begun[module] : place + 1]
            begun[module] = max(begun[module], place + 1)
    return tuple(ordered)
