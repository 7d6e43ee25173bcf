"""The engine behind the event loop: one thread that owns it, an inbox in, one call per step back.

Tensors never reach the event loop, and the event loop never waits for a step.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from manylora.adapters.types import AdapterWeights, FreedAdapter, Tier
from manylora.server.engine.adapter_cache import HeldAdapter, LoadFrom
from manylora.server.engine.adapter_readers import AdapterReaders, Hold, as_they_are
from manylora.server.engine.calls import Command, EngineCalls
from manylora.server.engine.door import fitted
from manylora.server.engine.engine import Engine
from manylora.server.engine.observer import EngineObserver
from manylora.server.engine.outbox import Outbox
from manylora.server.engine.output_stream import OutputStream
from manylora.server.engine.pace import Tempo
from manylora.server.engine.pieces import Piece, output_of
from manylora.server.engine.request import GenerationRequest, SequenceOutput
from manylora.server.engine.residency import Load
from manylora.server.engine.stats import EngineStats, stats_of
from manylora.server.errors import (
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    ServerError,
    ShuttingDown,
    StepFailed,
)

log = logging.getLogger(__name__)


class AsyncEngine:
    """Runs an Engine in a thread. Make it on the event loop, then ``start``."""

    def __init__(
        self,
        make: Callable[[Load], Engine],
        max_waiting: int,
        context_length: int,
        observer: EngineObserver,
        audit_after: float = 0.0,
        hold: Hold = as_they_are,
    ) -> None:
        """``audit_after``: seconds of silence after which the pools' books are checked; 0: never by themselves.

        ``hold``: how the host holds adapters' weights.
        """
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._hold = hold
        self._readers = AdapterReaders(self._arrived, observer, hold)
        self._engine = make(self._readers.read)
        self._outbox = Outbox(self._engine.requests.take_pieces, self._feed)
        self._max_waiting = max_waiting
        self._context = context_length
        self._observer = observer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, OutputStream] = {}
        self._handed_in = self._taken_in = 0
        """Clients' requests that were put into the inbox, and that the engine has taken out of it."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._draining = False
        self._broken: str | None = None
        self._audit_after = audit_after
        self._audit_due = False
        self._leaving: set[int] = set()
        """Adapters that are to be removed. A request for one is refused by ``submit``, where its caller can still
        look up the name again, and not only when the engine's thread gets to it."""
        self._calls = EngineCalls(self._inbox.put, self._on_loop, self._check_runs)

    # Life

    def start(self) -> None:
        """Start the thread; call on the event loop that will read the outputs."""
        self._loop = asyncio.get_running_loop()
        self._outbox.open(self._loop)
        self._thread.start()

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and wait for those under way; abort what is left after ``seconds``."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for stream in set(self._streams.values()):
                stream.abort()

    async def stop(self) -> None:
        """End the thread. Requests still under way are told."""
        self._draining = True
        if self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)
        self._outbox.close()
        self._readers.close()
        self._fail_all(ShuttingDown("the server has stopped"))

    @property
    def ready(self) -> bool:
        """Whether requests can be served."""
        sound = self._broken is None and self._engine.health.trouble is None
        return self._thread.is_alive() and not self._draining and sound

    @property
    def unready_reason(self) -> str:
        """Why not, if not."""
        trouble = self._broken or self._engine.health.trouble
        return trouble or ("the server drains" if self._draining else "the engine has not started")

    # Requests, on the event loop

    @property
    def tempo(self) -> Tempo | None:
        """How fast steps follow each other; None: clients wait for none."""
        return self._engine.scheduler.pace.tempo if self._streams else None

    def submit(self, request: GenerationRequest) -> OutputStream:
        """Queue a client's request of one prompt; see ``submit_together``."""
        return self.submit_together((request,))

    def submit_together(self, requests: Sequence[GenerationRequest]) -> OutputStream:
        """Queue the prompts of a client's request (one ``origin``), all or none. They count as one that waits.

        Raises at once QueueFull, ShuttingDown, StepFailed, ModelNotFound, ContextLengthExceeded, InvalidRequest.
        """
        if self._draining:
            raise ShuttingDown("the server is shutting down", retry_after=30)
        if self._broken is not None:
            raise StepFailed(f"the engine can't go on: {self._broken}")
        waiting = self._engine.scheduler.waiting.num_lines + self._handed_in - self._taken_in
        if waiting >= self._max_waiting:
            raise QueueFull(f"{waiting} requests are waiting already; try again later", retry_after=1)
        limit = min(self._context, self._engine.capacity_tokens())
        requests = [fitted(request, limit) for request in requests]
        for request in requests:
            if any(adapter_id in self._leaving for adapter_id, _ in request.adapters):
                raise ModelNotFound(f"there is no model {request.adapter_label!r} any more", param="model")
            self._engine.check(request)
            if request.request_id in self._streams:
                raise InvalidRequest(f"request id {request.request_id!r} is in use")
        stream = OutputStream(requests, self.abort)
        self._streams |= dict.fromkeys(stream.request_ids, stream)
        self._idle.clear()
        self._handed_in += 1
        self._inbox.put(lambda engine: self._take_in(engine, requests))
        return stream

    def _take_in(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            engine.add_request(request)
        self._taken_in += 1

    def prefetch(self, adapter_ids: Iterable[int]) -> None:
        """Begin to read those of these adapters that are on disk only: a request that will use them is on its way."""
        for adapter_id in adapter_ids:
            held = self._engine.cache.get(adapter_id)
            if held is not None:
                self._readers.read_ahead(held)

    def abort(self, request_id: str) -> None:
        """End a request: its stream ends with ABORTED outputs. Harmless when it has ended."""
        if request_id in self._streams:
            self._inbox.put(lambda engine: engine.abort(request_id))

    # Adapters, on the event loop; see manylora.server.catalog.types.AdapterEngine

    async def add_adapter(
        self,
        adapter_id: int,
        weights: AdapterWeights,
        *,
        load_from: LoadFrom,
        preload: bool,
        pinned: bool,
    ) -> None:
        """Take weights into the host tier and, with ``preload``, into the arena before returning."""
        if self._hold is not as_they_are:
            weights = await asyncio.to_thread(self._hold, weights)
        held = HeldAdapter(adapter_id, weights.rank_by_module(), load_from, pinned, weights)
        await self._calls.between_steps(lambda engine: engine.add_adapter(held))
        if preload:
            try:
                await self._preload(adapter_id, weights, pinned)
            except BaseException:
                # Nobody has been told of it yet.
                await self.remove_adapter(adapter_id, abort=False)
                raise

    async def add_adapter_cold(
        self,
        adapter_id: int,
        rank_by_module: Mapping[str, int],
        *,
        load_from: LoadFrom,
        pinned: bool,
        invocation: tuple[int, ...] = (),
    ) -> None:
        """Make known an adapter that is on disk only."""
        held = HeldAdapter(adapter_id, rank_by_module, load_from, pinned, None, invocation=invocation)
        await self._calls.between_steps(lambda engine: engine.add_adapter(held))

    async def keep_adapter(
        self, adapter_id: int, weights: AdapterWeights | None, *, preload: bool, pinned: bool
    ) -> None:
        """Pin or unpin a known adapter and, with ``preload``, put it on the device before returning."""
        if preload:
            await self._preload(adapter_id, weights, pinned)
        else:
            await self._calls.between_steps(lambda engine: engine.pin(adapter_id, pinned=pinned))

    async def _preload(self, adapter_id: int, weights: AdapterWeights | None, pinned: bool) -> None:
        """Put an adapter on the device, in as many pieces as it takes, so that no step waits long, and (un)pin it."""

        def some(engine: Engine) -> bool:
            done = engine.preload(adapter_id, weights)
            if done:
                engine.pin(adapter_id, pinned=pinned)
            return done

        await self._calls.until(some)

    async def remove_adapter(self, adapter_id: int, *, abort: bool) -> FreedAdapter:
        """Refuse new requests, let running ones finish (or abort them), give memory back; then return."""
        self._leaving.add(adapter_id)
        try:
            freed = await self._calls.call(
                lambda engine, done: engine.remove_adapter(adapter_id, done, abort=abort)
            )
        finally:
            self._leaving.discard(adapter_id)
        assert freed is not None
        return freed

    async def rest_adapter(self, adapter_id: int) -> None:
        """Unpin an adapter; it leaves device and host once running requests have ended, unless it is asked for."""
        await self._calls.between_steps(lambda engine: engine.rest_adapter(adapter_id))

    def adapter_tier(self, adapter_id: int) -> Tier:
        """Return where the weights are now."""
        return self._engine.cache.tier(adapter_id)

    def snapshot(self) -> EngineStats:
        """Return what the engine holds now."""
        return stats_of(self._engine)

    async def check_integrity(self) -> None:
        """Raise AssertionError if the pools' books don't balance. After each step a part of them is checked."""
        await self._calls.call(lambda engine, done: engine.auditor.begin(engine.audit(), done))

    def _check_runs(self) -> None:
        if self._broken is not None:
            raise StepFailed(f"the engine can't go on: {self._broken}")
        if not self._thread.is_alive():
            raise ShuttingDown("the engine is not running")

    # The thread

    def _run(self) -> None:
        engine = self._engine
        busy = True
        try:
            while self._take_commands(busy):
                worked = engine.step(self._outbox.put)
                busy = worked and (len(engine.requests) > 0 or engine.auditor.busy)
                if not busy:
                    self._deliver()
        except Exception as error:
            # A step's own faults are handled in it: this one leaves the books in doubt.
            log.error("the engine stopped", exc_info=error)
            self._broken = f"an internal check failed: {error}"
        self._deliver()
        if self._broken is not None:
            self._on_loop(lambda: self._fail_all(StepFailed(f"the engine can't go on: {self._broken}")))

    def _take_commands(self, busy: bool) -> bool:
        """Carry out what is in the inbox, waiting for something if there is nothing to compute; False: stop."""
        block = not busy
        while True:
            try:
                command = self._inbox.get(block=block, timeout=self._patience() if block else None)
            except queue.Empty:
                if block and self._audits and not len(self._engine.requests):
                    self._audit()
                return True
            if command is None:
                return False
            command(self._engine)
            self._audit_due = True
            block = False

    def _audit(self) -> None:
        """Check the books as long as no command comes."""
        for _ in self._engine.audit():
            if not self._inbox.empty():
                return
        self._audit_due = False

    def _patience(self) -> float | None:
        """Return how long to wait for a command: until a waiting request's time is over, or a probe is due."""
        engine = self._engine
        times = (engine.scheduler.next_deadline(), engine.health.next_probe())
        due = min((each for each in times if each is not None), default=None)
        if due is not None:
            return max(0.001, due - time.monotonic())
        return self._audit_after if self._audits and not len(engine.requests) else None

    @property
    def _audits(self) -> bool:
        return self._audit_due and self._audit_after > 0

    def _arrived(self, adapter_id: int, weights: AdapterWeights | Exception) -> None:
        """Hand what a reader brings to the engine."""

        def take(engine: Engine) -> None:
            engine.host_loaded(adapter_id, weights)
            self._readers.taken(adapter_id)

        self._inbox.put(take)

    def _deliver(self) -> None:
        """Hand over what the last step brought, now; else it is handed over once the next one computes."""
        self._outbox.put()
        self._on_loop(self._outbox.empty)

    def _on_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            return  # the loop has closed: nobody listens any more

    def _feed(self, pieces: Sequence[Piece | SequenceOutput]) -> None:
        for piece in pieces:
            output, fault = output_of(piece)
            if fault is not None:
                self._inbox.put(partial(_fail_text, output, fault))
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # its client has gone
            if stream.feed(output):
                del self._streams[output.request_id]
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams:
            self._idle.set()

    def _fail_all(self, error: ServerError) -> None:
        for stream in set(self._streams.values()):
            stream.fail(error)
        self._calls.fail(error)
        self._streams.clear()
        self._note_idle()


def _fail_text(told: SequenceOutput, fault: StepFailed, engine: Engine) -> None:
    engine.requests.fail_text(told, fault)
