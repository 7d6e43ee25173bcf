"""Carries out in the arena what the adapter cache has decided, piece by piece. Knows no requests."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_cache import AdapterCache, ArenaChange, Write
from manylora.server.engine.observer import EngineObserver
from manylora.server.engine.rank_allocator import Move
from manylora.server.kernels.step import AdapterRanges, RankRange

LEAST_RATE = 2e8
"""Bytes a second that are written at least, whatever was measured: a write may have been held up by others' work."""
Lost = tuple[frozenset[int], Exception]
"""Adapters that a fault took off the device, and the fault."""


class Arena(Protocol):
    """The device buffers of adapters."""

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        """Copy an adapter's factors into its rows, in pieces."""
        ...

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        """Move rows within a module, in pieces."""
        ...

    def release(self, ranges: AdapterRanges) -> None:
        """Give back memory of an adapter that is gone for good."""
        ...


class ArenaWriter:
    """Writes and moves rows; what a change that fails leaves in doubt leaves the device."""

    def __init__(self, arena: Arena, cache: AdapterCache, observer: EngineObserver) -> None:
        self._arena = arena
        self._cache = cache
        self._observer = observer
        self._queue: deque[ArenaChange] = deque()
        """In the order in which they were decided: each finds the arena as those before it leave it."""
        self._pieces: Iterator[None] | None = None
        """What is left of the first."""
        self._spent = 0.0
        """Seconds that it has taken."""
        self._rate = 1e9

    @property
    def pending(self) -> bool:
        """Whether anything is to be done."""
        return bool(self._queue)

    def bytes_in(self, seconds: float) -> float:
        """Return how much is written in that time, by what the last adapter took."""
        return self._rate * seconds

    def add(self, changes: Iterable[ArenaChange]) -> None:
        """Have changes carried out after those that were added before."""
        self._queue += changes

    def release(self, ranges: AdapterRanges) -> None:
        """Give back what an adapter had of its own; see RankArena."""
        self._arena.release(ranges)

    def work(self, seconds: float) -> list[Lost]:
        """Carry out pieces until the time is over, at least one; return what was lost."""
        lost: list[Lost] = []
        ends = time.perf_counter() + seconds
        while self._queue:
            change = self._queue[0]
            began = time.perf_counter()
            try:
                done = self._go_on(change, ends)
            except Exception as error:
                lost.append((self._give_up(change), error))
                continue
            self._spent += time.perf_counter() - began
            if done:
                self._end(change)
            if time.perf_counter() >= ends:
                break
        return lost

    def _go_on(self, change: ArenaChange, ends: float) -> bool:
        """Do pieces of a change until the time is over; say whether it is done, or of no use any more."""
        if not self._cache.awaits(change):
            return True
        if self._pieces is None:
            self._pieces = self._begin(change)
        return all(time.perf_counter() < ends for _ in self._pieces)

    def _begin(self, change: ArenaChange) -> Iterator[None]:
        if isinstance(change, Move):
            return self._arena.moving(change.module, change.source, change.target_start)
        return self._arena.writing(change.ranges, change.weights)

    def _end(self, change: ArenaChange) -> None:
        if self._cache.awaits(change):
            self._cache.carried_out(change)
            if isinstance(change, Write):
                nbytes = self._cache.row_bytes(change.adapter_id)
                self._rate = max(LEAST_RATE, nbytes / max(self._spent, 1e-6))
                self._observer.adapter_placed(self._spent)
        self._drop()

    def _drop(self) -> None:
        self._queue.popleft()
        self._pieces, self._spent = None, 0.0

    def _give_up(self, change: ArenaChange) -> frozenset[int]:
        """Take off the device what is in doubt after a fault."""
        if isinstance(change, Write):
            self._drop()
            self._cache.evict(change.adapter_id)
            return frozenset((change.adapter_id,))
        # Moves build on each other: no range is where the books say, up to the last change.
        self._drop()
        self._queue.clear()
        return self._cache.evict_all()
