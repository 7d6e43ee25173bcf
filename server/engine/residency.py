"""Adapters on their way between disk, host and device: reads, room in the arena, and its changes in pieces.

The adapter cache decides, the arena writer copies; here is told when, and for how long those who decode wait for it.
"""

import math
from collections.abc import Callable, Iterable

from manylora.adapters.errors import UnsupportedAdapter
from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_cache import AdapterCache, HeldAdapter, Placement
from manylora.server.engine.arena_writer import ArenaWriter
from manylora.server.engine.faults import step_failed
from manylora.server.engine.request import FinishReason
from manylora.server.engine.requests import LiveRequests
from manylora.server.engine.room import lack
from manylora.server.engine.scheduler import Scheduler
from manylora.server.engine.step_plan import ScheduledRow, StepPlan
from manylora.server.errors import AdapterUnavailable, ServerError

Load = Callable[[HeldAdapter], None]
"""Starts reading an adapter's weights elsewhere; ``Engine.host_loaded`` takes the result."""


class Residency:
    """Where adapters are, and what is done to get them elsewhere. The engine's thread alone."""

    def __init__(
        self,
        cache: AdapterCache,
        writer: ArenaWriter,
        scheduler: Scheduler,
        requests: LiveRequests,
        load: Load,
    ) -> None:
        self._cache = cache
        self._writer = writer
        self._scheduler = scheduler
        self._requests = requests
        self._load = load
        self._loading: set[int] = set()
        self._preloads: dict[int, bool] = {}
        """Adapters that are on their way to the device by themselves, and whether a fault stopped them."""

    def add(self, held: HeldAdapter) -> None:
        """Take in an adapter. Raises UnsupportedAdapter, having changed nothing, if it needs more than there is."""
        if not self._cache.fits([held]):
            # Not a matter of time: who tries again gets the same.
            what, flag = lack(held.ranks, self._cache.allocator.rows)
            raise UnsupportedAdapter(f"the adapter needs {what}; start with a larger {flag}")
        self._cache.add(held)
        self.trim()

    def forget(self, adapter_id: int) -> None:
        """Let go what is known of an adapter that is gone for good."""
        self._preloads.pop(adapter_id, None)

    def trim(self) -> None:
        """Let host copies go that are over the limit and not about to be used."""
        self._cache.trim_host(self._scheduler.wanted)

    def preload(self, adapter_id: int, weights: AdapterWeights | None) -> bool:
        """Put an adapter on the device; False: it is on its way, over the next steps, and another call tells more.

        ``weights`` are taken if it is on disk only. Raises AdapterUnavailable without room.
        """
        held = self._cache.get(adapter_id)
        lost = self._preloads.pop(adapter_id, False)
        if held is None or held.retired:
            raise AdapterUnavailable("the adapter was deleted meanwhile")
        if lost:
            raise AdapterUnavailable("the adapter could not be copied to the device; see the server's log")
        if held.settled:
            return True
        if held.ranges is None:
            self._place(held, weights)
        self._preloads[adapter_id] = False
        return False

    def _place(self, held: HeldAdapter, weights: AdapterWeights | None) -> None:
        if held.weights is None and weights is not None:
            self._cache.take_copy(held.adapter_id, weights)
        if not self._cache.fits([held]):
            raise self._never_fits(held)
        ids, in_use = {held.adapter_id}, self._scheduler.in_use()
        if self._cache.can_place(ids, in_use) not in (Placement.LOADABLE, Placement.IN_PIECES):
            raise AdapterUnavailable("the arena is full of adapters in use; try again later", retry_after=5)
        self._writer.add(self._cache.place(ids, in_use))
        self._cache.touch(ids)

    def _never_fits(self, held: HeldAdapter) -> AdapterUnavailable:
        """Return what is said of one whose vocabulary, once read, turns out to be larger than all room for them."""
        what, flag = lack(held.ranks, self._cache.allocator.rows)
        return AdapterUnavailable(f"it needs {what}; start the server with a larger {flag}")

    def read(self, adapter_ids: Iterable[int]) -> None:
        """Begin to read adapters from disk, unless that is under way."""
        for adapter_id in adapter_ids:
            if adapter_id not in self._loading:
                self._loading.add(adapter_id)
                self._load(self._cache[adapter_id])

    def loaded(self, adapter_id: int, weights: AdapterWeights | Exception) -> None:
        """Take in weights read from disk, or fail the requests that waited for them."""
        self._loading.discard(adapter_id)
        if adapter_id not in self._cache:
            return
        if isinstance(weights, AdapterWeights):
            self._cache.take_copy(adapter_id, weights)
            # Whoever had it read may have been refused since, and pushes nothing out.
            if any(adapter_id in live.acting_ids for live in self._requests):
                self._cache.touch({adapter_id})
            held = self._cache[adapter_id]
            if self._cache.fits([held]):
                return
            weights = self._never_fits(held)
        unread = AdapterUnavailable(f"adapter can't be read: {weights}")
        error = weights if isinstance(weights, ServerError) else unread
        for live in self._requests:
            if adapter_id in live.acting_ids and not live.holds_adapters:
                self._requests.end(live, FinishReason.FAILED, error)

    def before_schedule(self) -> None:
        """Say how much of the arena may be changed at once: without bound where nobody decodes, else behind nothing."""
        if not self._scheduler.running:
            self._cache.at_once = math.inf
        elif self._writer.pending:
            self._cache.at_once = 0.0
        else:
            self._cache.at_once = self._writer.bytes_in(self._scheduler.pace.for_arena(awaited=True))

    def add_changes(self, plan: StepPlan) -> bool:
        """Take in a step's changes; say whether there is something to be carried out now."""
        self._writer.add(plan.changes)
        return self._writer.pending

    def change_arena(self, rows: tuple[ScheduledRow, ...]) -> None:
        """Carry out what the rows need, all of it where there are none, else as much as a part of a step allows."""
        if not rows or not all(self._cache.resident(row.sequence.needed_ids) for row in rows):
            self._work(math.inf)
            return
        awaited = any(self._cache.settling & live.acting_ids for live in self._requests)
        self._work(self._scheduler.pace.for_arena(awaited=awaited))

    def _work(self, seconds: float) -> None:
        """Carry out moves and writes, and fail the requests that were using what a fault took off the device."""
        for adapter_ids, error in self._writer.work(seconds):
            self._preloads |= dict.fromkeys(self._preloads.keys() & adapter_ids, True)
            failed = step_failed("copying an adapter to the device failed", error)
            for live in self._requests:
                tried = live.admitted is not None or live.blocked_since is not None
                if tried and live.acting_ids & adapter_ids:
                    self._requests.end(live, FinishReason.FAILED, failed)
