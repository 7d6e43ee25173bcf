"""Adapters that are to go once no request uses them any more: for good, or to the disk until they are asked for.

Kept here and nowhere else; what is in use is told by the caller, derived from live requests.
"""

from collections.abc import Callable, Set

from manylora.adapters.types import FreedAdapter
from manylora.adapters.vocabulary import VOCABULARY
from manylora.server.engine.adapter_cache import AdapterCache
from manylora.server.kernels.step import AdapterRanges

Freed = Callable[[FreedAdapter], None]


class Leaving:
    """What leaves ``cache`` as soon as it may."""

    def __init__(
        self,
        cache: AdapterCache,
        give_back: Callable[[AdapterRanges], None],
        forget: Callable[[int], None],
    ) -> None:
        """``give_back``: what an adapter has of the device beside rows; ``forget`` lets its prefixes go."""
        self._cache = cache
        self._give_back = give_back
        self._forget = forget
        self._removed: dict[int, tuple[tuple[Freed, ...], int]] = {}
        """Whom to tell, and how many sequences were aborted for it."""
        self._resting: set[int] = set()

    def remove(self, adapter_id: int, freed: Freed, aborted: int) -> None:
        """Have an adapter go for good, and ``freed`` called then with what that gives back."""
        self._cache[adapter_id].retired = True
        self._resting.discard(adapter_id)
        earlier, before = self._removed.get(adapter_id, ((), 0))
        self._removed[adapter_id] = ((*earlier, freed), before + aborted)

    def rest(self, adapter_id: int) -> None:
        """Have an adapter leave device and host, unpinned; requests for it bring it back, as ever."""
        self._cache[adapter_id].pinned = False
        self._resting.add(adapter_id)

    def stay(self, adapter_id: int) -> None:
        """Have an adapter that was to rest be kept as any other."""
        self._resting.discard(adapter_id)

    def release(self, used: Callable[[], Set[int]]) -> None:
        """Let go what may go now; ``used`` is asked only if something waits for that."""
        if not self._removed and not self._resting:
            return
        in_use = used()
        for adapter_id in self._resting - in_use:
            self._resting.discard(adapter_id)
            self._give_back_of(adapter_id)
            self._cache.evict(adapter_id)
            self._cache.drop_copy(adapter_id)
        for adapter_id in self._removed.keys() - in_use:
            listeners, aborted = self._removed.pop(adapter_id)
            given_back = self._take_out(adapter_id, aborted)
            for freed in listeners:
                freed(given_back)

    def _take_out(self, adapter_id: int, aborted: int) -> FreedAdapter:
        ranges = self._cache[adapter_id].ranges or {}
        device = self._cache.device_bytes(adapter_id)
        self._give_back_of(adapter_id)
        host = self._cache.drop_copy(adapter_id)
        self._forget(adapter_id)
        self._cache.remove(adapter_id)
        rows = sum(owned.rank for module, owned in ranges.items() if module != VOCABULARY)
        return FreedAdapter(rows, device, host, aborted)

    def _give_back_of(self, adapter_id: int) -> None:
        """Give back what it has of the device.

        Before it is settled its ranges are its own in the books alone: others' vocabularies may lie in them, yet to be
        moved. What lies elsewhere of its own goes with the next write to that.
        """
        held = self._cache[adapter_id]
        if held.settled:
            self._give_back(held.ranges or {})
