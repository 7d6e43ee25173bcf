"""Which adapters are on the device, on the host, or on disk only, and who makes room for whom.

Decides and keeps the books; the engine copies tensors and reads files. What is in use is told by the caller,
derived from live sequences: nothing here counts users.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

from manylora.adapters.types import AdapterWeights, Tier
from manylora.adapters.vocabulary import VOCABULARY
from manylora.server.engine.rank_allocator import Move, RankAllocator, adapter_by_adapter
from manylora.server.kernels.step import AdapterRanges

LoadFrom = Callable[[], AdapterWeights]
AUDITED = 64
"""Adapters whose books are checked at a time: some hundred microseconds."""


@dataclass(slots=True)
class HeldAdapter:
    """What is known of one adapter."""

    adapter_id: int
    ranks: Mapping[str, int]
    load_from: LoadFrom
    pinned: bool
    weights: AdapterWeights | None
    """The host copy."""
    ranges: AdapterRanges | None = None
    """Its rows on the device."""
    retired: bool = False
    """Takes no new requests."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in a prompt on it acts; (): it always does. Weights, where given, say it."""
    changes: list["ArenaChange"] = field(default_factory=list)
    """What is still to be carried out in the arena, in order, before its rows are its own."""

    def __post_init__(self) -> None:
        if self.weights is not None:
            self.invocation = self.weights.invocation

    @property
    def settled(self) -> bool:
        """Whether its rows hold its weights."""
        return self.ranges is not None and not self.changes

    @property
    def known_ranks(self) -> Mapping[str, int]:
        """Its ranks. Of a vocabulary that is yet to be read it is known only what it takes at most."""
        if self.weights is not None or self.ranges is not None or VOCABULARY not in self.ranks:
            return self.ranks
        return {module: rank for module, rank in self.ranks.items() if module != VOCABULARY}

    @property
    def tier(self) -> Tier:
        """The best tier that has the weights whole, or has them on their way to the device: they aren't read again."""
        if self.ranges is not None:
            return "device" if self.settled else "host"
        return "disk" if self.weights is None else "host"


@dataclass(frozen=True, slots=True)
class Write:
    """Weights to be copied into rows of the arena."""

    adapter_id: int
    ranges: AdapterRanges
    weights: AdapterWeights


ArenaChange = Move | Write


class Placement(Enum):
    """Whether a set of adapters can be used in this step."""

    READY = auto()
    LOADABLE = auto()
    """Room can be made, and filled before the next step."""
    IN_PIECES = auto()
    """Room can be made, but moving and writing take so long that it is done over several steps."""
    NEEDS_HOST = auto()
    """The weights must be read from disk first."""
    NO_ROOM = auto()
    """Adapters in use, or pinned ones, hold the rows."""


class AdapterCache:
    """Tiers and their limits. Methods named as questions change nothing.

    ``in``, ``get``, ``tier``, ``tiers`` and ``fits`` may be called from any thread.
    """

    def __init__(self, rows: Mapping[str, int], host_bytes: int, row_bytes: Mapping[str, int]) -> None:
        """``rows`` of each module, and what one of them takes on the device over all layers."""
        self._row_bytes = row_bytes
        self.allocator = RankAllocator(rows)
        self.host_limit = host_bytes
        self._held: dict[int, HeldAdapter] = {}
        self._order: OrderedDict[int, None] = OrderedDict()
        """The longest unused first."""
        self._copies: dict[int, int] = {}
        """Bytes of each host copy: adding up an adapter's tensors in each step would cost more than the step."""
        self.host_bytes = 0
        self._settling: set[int] = set()
        self.at_once = math.inf
        """Bytes that may still be moved and written before the next step; the engine sets it by what runs."""

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self._held

    def __getitem__(self, adapter_id: int) -> HeldAdapter:
        return self._held[adapter_id]

    def __len__(self) -> int:
        return len(self._held)

    def get(self, adapter_id: int) -> HeldAdapter | None:
        """Return what is known of an adapter, if anything is."""
        return self._held.get(adapter_id)

    def tier(self, adapter_id: int) -> Tier:
        """Return the best tier that has the weights."""
        return self._held[adapter_id].tier

    def tiers(self) -> dict[int, Tier]:
        """Return the best tier of each adapter."""
        return {held.adapter_id: held.tier for held in list(self._held.values())}

    def fits(self, adapters: Iterable[HeldAdapter]) -> bool:
        """Say whether an otherwise empty arena could hold all these at once."""
        return self.allocator.fits_empty(self.needs(adapters))

    @staticmethod
    def needs(adapters: Iterable[HeldAdapter]) -> dict[str, int]:
        """Return the rows of each module that these take together, as far as it is known."""
        total: dict[str, int] = {}
        for adapter in adapters:
            for module, rank in adapter.known_ranks.items():
                total[module] = total.get(module, 0) + rank
        return total

    def add(self, held: HeldAdapter) -> None:
        """Take in a new adapter."""
        assert held.adapter_id not in self._held, "ids are never used again"
        held.ranks = {module: rank for module, rank in held.ranks.items() if rank > 0}
        self._held[held.adapter_id] = held
        self._order[held.adapter_id] = None
        if held.weights is not None:
            self.take_copy(held.adapter_id, held.weights)

    def remove(self, adapter_id: int) -> None:
        """Forget an adapter, free its rows and drop its host copy."""
        self.evict(adapter_id)
        self.drop_copy(adapter_id)
        del self._order[adapter_id]
        del self._held[adapter_id]

    def touch(self, adapter_ids: Iterable[int]) -> None:
        """Note that these are used now."""
        for adapter_id in adapter_ids:
            self._order.move_to_end(adapter_id)

    def take_copy(self, adapter_id: int, weights: AdapterWeights) -> None:
        """Keep a host copy; ``trim_host`` then sees to the limit."""
        self.drop_copy(adapter_id)
        held = self._held[adapter_id]
        held.weights = weights
        if held.ranges is None and VOCABULARY in held.ranks:
            # Until they were read it was known how much they take at most.
            held.ranks = {**held.ranks, VOCABULARY: weights.rank_by_module().get(VOCABULARY, 0)}
            held.ranks = {module: rank for module, rank in held.ranks.items() if rank > 0}
        self._copies[adapter_id] = weights.nbytes
        self.host_bytes += self._copies[adapter_id]

    def drop_copy(self, adapter_id: int) -> int:
        """Let the host copy go; return its bytes."""
        freed = self._copies.pop(adapter_id, 0)
        self._held[adapter_id].weights = None
        self.host_bytes -= freed
        return freed

    @property
    def settling(self) -> set[int]:
        """Adapters with changes of the arena to be carried out. Not to be changed."""
        return self._settling

    def resident(self, adapter_ids: Iterable[int]) -> bool:
        """Say whether all are on the device, and whole."""
        return all(self._held[i].settled for i in adapter_ids)

    def device_bytes(self, adapter_id: int) -> int:
        """Return what an adapter takes on the device."""
        ranges = self._held[adapter_id].ranges or {}
        return sum(owned.rank * self._row_bytes[module] for module, owned in ranges.items())

    def row_bytes(self, adapter_id: int) -> int:
        """Return what its rank rows take of that."""
        ranges = self._held[adapter_id].ranges or {}
        rows = (item for item in ranges.items() if item[0] != VOCABULARY)
        return sum(owned.rank * self._row_bytes[module] for module, owned in rows)

    def evictable(self, adapter_ids: Iterable[int]) -> bool:
        """Say whether some of these hold rows that others might wait for."""
        return any(not self._held[i].pinned for i in adapter_ids)

    def can_place(self, adapter_ids: Set[int], in_use: Set[int]) -> Placement:
        """Say what it takes to have all these on the device, without touching those in use."""
        missing = self._missing(adapter_ids)
        if not missing:
            return Placement.READY
        if any(h.weights is None for h in missing):
            return Placement.NEEDS_HOST
        victims = self._victims(adapter_ids, in_use)
        if victims is None:
            return Placement.NO_ROOM
        cost = self._cost(self._moves(missing, frozenset(victims)), missing)
        return Placement.IN_PIECES if cost > self.at_once else Placement.LOADABLE

    def place(self, adapter_ids: Set[int], in_use: Set[int]) -> tuple[ArenaChange, ...]:
        """Make room and give rows; return the changes to carry out in the arena, in order.

        Until each is told to be ``carried_out``, the adapters that it is about are not resident.
        """
        self._make_room(adapter_ids, in_use)
        missing = self._missing(adapter_ids)
        moves = adapter_by_adapter(self._moves(missing))
        self._apply(moves)
        self.at_once = max(0.0, self.at_once - self._cost(moves, missing))
        changes: list[ArenaChange] = [*moves]
        for held in missing:
            assert held.weights is not None
            held.ranges = self.allocator.allocate(held.adapter_id, held.ranks)
            changes.append(Write(held.adapter_id, held.ranges, held.weights))
        for change in changes:
            self._held[change.adapter_id].changes.append(change)
            self._settling.add(change.adapter_id)
        return tuple(changes)

    def awaits(self, change: ArenaChange) -> bool:
        """Say whether a change is still to be carried out: not if its adapter has left the device meanwhile."""
        held = self._held.get(change.adapter_id)
        return held is not None and any(each is change for each in held.changes)

    def carried_out(self, change: ArenaChange) -> None:
        """Note that a change has been carried out."""
        held = self._held[change.adapter_id]
        held.changes = [each for each in held.changes if each is not change]
        if not held.changes:
            self._settling.discard(change.adapter_id)

    def evict(self, adapter_id: int) -> int:
        """Take an adapter off the device; return the rows that it had."""
        held = self._held[adapter_id]
        held.ranges, held.changes = None, []
        self._settling.discard(adapter_id)
        return self.allocator.free(adapter_id)

    def evict_all(self) -> frozenset[int]:
        """Take every adapter off the device; return those that had rows."""
        found = frozenset(i for i, held in self._held.items() if held.ranges is not None)
        for adapter_id in found:
            self.evict(adapter_id)
        return found

    def trim_host(self, wanted: Set[int]) -> None:
        """Drop the longest unused host copies until the limit holds; never those in ``wanted``."""
        if self.host_bytes <= self.host_limit:
            return
        for adapter_id in self._order:
            if self.host_bytes <= self.host_limit:
                return
            if adapter_id not in wanted:
                self.drop_copy(adapter_id)

    def audit(self) -> Iterator[None]:
        """Check the books in parts that take less than a millisecond each; raises AssertionError where they're wrong.

        Each part holds by itself: anything may happen between two of them.
        """
        for start in range(0, len(self._held), AUDITED):
            for held in islice(list(self._held.values()), start, start + AUDITED):
                expected = {} if held.ranges is None else dict(held.ranges)
                assert dict(self.allocator.ranges(held.adapter_id)) == expected, (
                    "ranges differ from the allocator's"
                )
                settling = held.adapter_id in self._settling
                assert settling == bool(held.changes), "it isn't known who settles"
                assert held.ranges is not None or not held.changes, "what has no rows is being written"
            yield
        self.allocator.check_integrity()
        yield
        self._check_sums()

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        for _ in self.audit():
            pass

    def _check_sums(self) -> None:
        # Their bytes aren't added up again: weights never change, and a thousand adapters would take 50 ms.
        copies = {i for i, h in self._held.items() if h.weights is not None}
        assert copies == set(self._copies), "host copies differ from their books"
        assert sum(self._copies.values()) == self.host_bytes, "host bytes are lost"
        assert set(self._order) == set(self._held), "an adapter has no place in the order of use"
        total = sum(self.allocator.rows.values())
        free = sum(self.allocator.free_rows(module) for module in self.allocator.rows)
        owned = sum(r.rank for h in self._held.values() for r in (h.ranges or {}).values())
        assert total - free == owned, "rows are lost"

    def _missing(self, adapter_ids: Set[int]) -> list[HeldAdapter]:
        """Return those that aren't on the device, in the order of their ids."""
        return [self._held[i] for i in sorted(adapter_ids) if self._held[i].ranges is None]

    def _make_room(self, adapter_ids: Set[int], in_use: Set[int]) -> None:
        victims = self._victims(adapter_ids, in_use)
        assert victims is not None, "ask can_place first"
        for victim in victims:
            self.evict(victim)

    def _moves(self, missing: list[HeldAdapter], gone: Set[int] = frozenset()) -> tuple[Move, ...]:
        """Return the moves that it takes to give all these their rows: none where each finds a gap of its own."""
        if self.allocator.find_gaps([held.ranks for held in missing], gone):
            return ()
        return self.allocator.plan_compaction(self.needs(missing), gone)

    def _cost(self, moves: Iterable[Move], missing: Iterable[HeldAdapter]) -> int:
        """Return the bytes that moves and writes of these take."""
        return sum(map(self._moved_bytes, moves)) + sum(map(self._written_bytes, missing))

    def _written_bytes(self, held: HeldAdapter) -> int:
        return sum(rank * self._row_bytes[module] for module, rank in held.ranks.items())

    def _moved_bytes(self, move: Move) -> int:
        # A vocabulary is noted elsewhere, and not copied.
        return 0 if move.module == VOCABULARY else move.source.rank * self._row_bytes[move.module]

    def _apply(self, moves: tuple[Move, ...]) -> None:
        self.allocator.apply(moves)
        for adapter_id in {move.adapter_id for move in moves}:
            self._held[adapter_id].ranges = self.allocator.ranges(adapter_id)

    def _victims(self, adapter_ids: Set[int], in_use: Set[int]) -> tuple[int, ...] | None:
        need = self.needs(self._missing(adapter_ids))
        short = {m: rank - self.allocator.free_rows(m) for m, rank in need.items()}
        victims: list[int] = []
        for held in map(self._held.__getitem__, self._order):
            if all(rows <= 0 for rows in short.values()):
                break
            needed = held.adapter_id in in_use or held.adapter_id in adapter_ids
            idle = not needed and held.adapter_id not in self._settling
            if held.ranges is None or held.pinned or not idle:
                continue
            if any(short.get(module, 0) > 0 for module in held.ranges):
                victims.append(held.adapter_id)
                for module, owned in held.ranges.items():
                    short[module] = short.get(module, 0) - owned.rank
        return tuple(victims) if all(rows <= 0 for rows in short.values()) else None
