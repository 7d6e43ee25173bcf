"""Which adapters are on the device, on the host, or on disk only, and who makes room for whom.

Decides and keeps the books; the engine copies tensors and reads files. What is in use is told by the caller,
derived from live sequences: nothing here counts users.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import Enum, auto

from manylora.adapters.types import AdapterWeights, Tier
from manylora.server.engine.rank_allocator import Move, RankAllocator
from manylora.server.kernels.step import AdapterRanges

LoadFrom = Callable[[], AdapterWeights]
MOVED_BYTES = 64 << 20
"""Of the arena, moved in one step to join free rows: some ten milliseconds that everybody waits."""


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

    def __post_init__(self) -> None:
        if self.weights is not None:
            self.invocation = self.weights.invocation

    @property
    def tier(self) -> Tier:
        """The best tier that has the weights."""
        if self.ranges is not None:
            return "device"
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
    """Room can be made."""
    FRAGMENTED = auto()
    """There is room, but joining it takes more moves than one step may make: see ``AdapterCache.tidy``."""
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
        """Return the rows of each module that these take together."""
        total: dict[str, int] = {}
        for adapter in adapters:
            for module, rank in adapter.ranks.items():
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
        self._held[adapter_id].weights = weights
        self._copies[adapter_id] = weights.nbytes
        self.host_bytes += self._copies[adapter_id]

    def drop_copy(self, adapter_id: int) -> int:
        """Let the host copy go; return its bytes."""
        freed = self._copies.pop(adapter_id, 0)
        self._held[adapter_id].weights = None
        self.host_bytes -= freed
        return freed

    def resident(self, adapter_ids: Iterable[int]) -> bool:
        """Say whether all are on the device."""
        return all(self._held[i].ranges is not None for i in adapter_ids)

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
        moves = self._moves(missing, frozenset(victims))
        fits = sum(map(self._moved_bytes, moves)) <= MOVED_BYTES
        return Placement.LOADABLE if fits else Placement.FRAGMENTED

    def tidy(self, adapter_ids: Set[int], in_use: Set[int]) -> tuple[ArenaChange, ...]:
        """Take the first step towards room in one piece: make room, move up to MOVED_BYTES but at least one range."""
        self._make_room(adapter_ids, in_use)
        moves: list[Move] = []
        moved = 0
        for move in self._moves(self._missing(adapter_ids)):
            moved += self._moved_bytes(move)
            if moves and moved > MOVED_BYTES:
                break
            moves.append(move)
        self._apply(tuple(moves))
        return tuple(moves)

    def place(self, adapter_ids: Set[int], in_use: Set[int]) -> tuple[ArenaChange, ...]:
        """Make room and give rows; return the changes to carry out in the arena, in order."""
        self._make_room(adapter_ids, in_use)
        missing = self._missing(adapter_ids)
        moves = self._moves(missing)
        self._apply(moves)
        changes: list[ArenaChange] = [*moves]
        for held in missing:
            assert held.weights is not None
            held.ranges = self.allocator.allocate(held.adapter_id, held.ranks)
            changes.append(Write(held.adapter_id, held.ranges, held.weights))
        return tuple(changes)

    def evict(self, adapter_id: int) -> int:
        """Take an adapter off the device; return the rows that it had."""
        self._held[adapter_id].ranges = None
        return self.allocator.free(adapter_id)

    def trim_host(self, wanted: Set[int]) -> None:
        """Drop the longest unused host copies until the limit holds; never those in ``wanted``."""
        if self.host_bytes <= self.host_limit:
            return
        for adapter_id in self._order:
            if self.host_bytes <= self.host_limit:
                return
            if adapter_id not in wanted:
                self.drop_copy(adapter_id)

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        self.allocator.check_integrity()
        for held in self._held.values():
            expected = {} if held.ranges is None else dict(held.ranges)
            assert dict(self.allocator.ranges(held.adapter_id)) == expected, (
                "ranges differ from the allocator's"
            )
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

    def _moved_bytes(self, move: Move) -> int:
        return move.source.rank * self._row_bytes[move.module]

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
            idle = held.adapter_id not in in_use and held.adapter_id not in adapter_ids
            if held.ranges is None or held.pinned or not idle:
                continue
            if any(short.get(module, 0) > 0 for module in held.ranges):
                victims.append(held.adapter_id)
                for module, owned in held.ranges.items():
                    short[module] = short.get(module, 0) - owned.rank
        return tuple(victims) if all(rows <= 0 for rows in short.values()) else None
