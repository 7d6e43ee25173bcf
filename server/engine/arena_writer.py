"""Carries out in the arena what the adapter cache has decided. Knows no requests."""

import time
from collections.abc import Iterable
from typing import Protocol

from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_cache import AdapterCache, ArenaChange, Write
from manylora.server.engine.observer import EngineObserver
from manylora.server.engine.rank_allocator import Move
from manylora.server.kernels.step import AdapterRanges, RankRange

Lost = tuple[frozenset[int], Exception]
"""Adapters that a fault took off the device, and the fault."""


class Arena(Protocol):
    """The device buffers of adapters."""

    def write(self, ranges: AdapterRanges, weights: AdapterWeights) -> None:
        """Copy an adapter's factors into its rows."""
        ...

    def move(self, module: str, source: RankRange, target_start: int) -> None:
        """Move rows within a module."""
        ...


class ArenaWriter:
    """Writes and moves rows; what a change that fails leaves in doubt leaves the device."""

    def __init__(self, arena: Arena, cache: AdapterCache, observer: EngineObserver) -> None:
        self._arena = arena
        self._cache = cache
        self._observer = observer

    def carry_out(self, changes: Iterable[ArenaChange]) -> list[Lost]:
        """Carry out moves and writes, in order; return what was lost."""
        lost: list[Lost] = []
        for change in changes:
            began = time.perf_counter()
            try:
                if isinstance(change, Move):
                    self._arena.move(change.module, change.source, change.target_start)
                else:
                    self._arena.write(change.ranges, change.weights)
                    self._observer.adapter_placed(time.perf_counter() - began)
            except Exception as error:
                if isinstance(change, Write):
                    lost.append((self._evict({change.adapter_id}), error))
                else:
                    # Moves build on each other: no range is where the books say, up to the last change.
                    resident = {i for i, tier in self._cache.tiers().items() if tier == "device"}
                    return [*lost, (self._evict(resident), error)]
        return lost

    def _evict(self, adapter_ids: set[int]) -> frozenset[int]:
        for adapter_id in adapter_ids:
            self._cache.evict(adapter_id)
        return frozenset(adapter_ids)
