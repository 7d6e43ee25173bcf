"""From a source to checked weights in the store: one download or copy and one read, however many ask at once.

Works in threads, a few at a time, and downloads in others: a slow host holds no directory up. Knows no names and
no engine. Files that nobody wants any more are deleted here too, since publishing and deleting one digest must not
overlap.
"""

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from manylora.adapters.base_form import BaseForm
from manylora.adapters.errors import AdapterError, FetchStopped
from manylora.adapters.reader import (
    AdapterOutline,
    Between,
    LoadedAdapter,
    go_on,
    inspect_adapter,
    read_adapter,
)
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.source import Source
from manylora.adapters.sources.upload import Upload
from manylora.adapters.spec import AdapterSpec
from manylora.adapters.store import AdapterStore, StagedAdapter
from manylora.adapters.tokens import AdapterText
from manylora.adapters.types import AdapterWeights
from manylora.server.catalog.fair_slots import FairSlots
from manylora.server.catalog.operations import Caller
from manylora.server.catalog.progress import Progress
from manylora.server.catalog.types import CatalogSettings
from manylora.server.errors import QueueFull
from manylora.server.threads import Rests

T = TypeVar("T")
MOST_KNOWN = 1024
"""Remote versions whose digests are remembered."""
MOST_UPLOADS, MOST_OF_A_TENANT = 8, 2
"""Uploads at the same time, of all and of one tenant: they take disk before anything is known of them."""
Spawn = Callable[[Coroutine[object, object, None]], object]


class KeyedLocks:
    """A lock per key, which lives as long as someone holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of ``key`` inside the ``async with``."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            yield


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter that is in the store and fits the base."""

    digest: str
    spec: AdapterSpec
    rank: int
    text: AdapterText
    weights: AdapterWeights
    trained_on: BaseForm | None = None


@dataclass(eq=False, slots=True)
class _Flight:
    """One preparation under way, and who waits for it or still uses its result."""

    progress: Progress = field(default_factory=Progress)
    users: set[object] = field(default_factory=set)
    digest: str | None = None
    task: "asyncio.Task[Prepared] | None" = None
    is_stopped: bool = False
    """Nobody wants it any more."""

    def heard(self, done: int, total: int | None) -> None:
        """Note how far the files are. Raises FetchStopped once nobody wants them."""
        self.progress.done, self.progress.total = done, total
        if self.is_stopped:
            raise FetchStopped("nobody waits for these files any more")


class AdapterIntake:
    """Prepares adapters and keeps their files while anyone wants them. Lives on the event loop."""

    def __init__(
        self, store: AdapterStore, settings: CatalogSettings, served: Callable[[str], bool], spawn: Spawn
    ) -> None:
        """``served`` says whether an adapter with that digest is being served or still runs; ``spawn`` tidies up."""
        self._store = store
        self._settings = settings
        self._served = served
        self._spawn = spawn
        self._finding = settings.finding
        self._tenant = ""
        self._downloads = FairSlots(settings.download_workers)
        self._downloaders = ThreadPoolExecutor(settings.download_workers, "download")
        self._uploads: Counter[str] = Counter()
        """How many are being sent, by tenant; "" is whoever runs the server."""
        self._known: OrderedDict[Hashable, str] = OrderedDict()
        """The digests of what remote sources had in their versions."""
        self._slots = asyncio.Semaphore(settings.workers)
        self._awaited: set[Caller] = set()
        """Of those who prepare something: the ones whom a request waits for."""
        self._digests = KeyedLocks()
        self._flights: dict[Hashable, _Flight] = {}

    def below(self, folder: str) -> "AdapterIntake":
        """Return the intake of a tenant, who may name what lies in its folder of the adapter root and of buckets."""
        narrow = copy(self)
        narrow._finding = self._finding.below(folder)
        narrow._tenant = folder
        return narrow

    async def work(self, blocking: Callable[[], T]) -> T:
        """Run ``blocking`` in a thread, with at most ``workers`` others."""
        async with self._slots:
            return await asyncio.to_thread(blocking)

    @contextlib.asynccontextmanager
    async def prepared(self, offer: Offer, caller: Caller) -> AsyncIterator[Prepared]:
        """Fetch, check and publish the adapter that is offered; its files stay at least until the block ends.

        Callers with the same unchanged files share one preparation, and see its progress. Raises CallerLeft as soon as
        the caller leaves; a preparation that nobody waits for any more ends by itself. Not to be cancelled inside
        (the catalog's operations aren't). Raises what Finding.find, Source.fetch, AdapterStore and read_adapter raise.
        """
        key = await caller.unless_left(asyncio.ensure_future(self._identify(offer, caller)))
        source, _ = key
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(Progress(is_remote=source.is_remote))
            flight.task = asyncio.create_task(self._prepare(flight, source))
        user = object()
        flight.users.add(user)
        if caller.is_awaited:
            self._awaited.add(caller)
        caller.progress = flight.progress
        try:
            assert flight.task is not None
            yield await caller.unless_left(flight.task)
        finally:
            self._awaited.discard(caller)
            flight.users.discard(user)
            if not flight.users:
                del self._flights[key]
                await self._wind_up(flight)

    @contextlib.asynccontextmanager
    async def receiving(self, most: int | None) -> AsyncIterator[Upload]:
        """Take an upload in the ``async with``, of at most so many bytes; what is left of it goes with the block.

        Raises QueueFull when too many are being sent, StoreFull.
        """
        tenant, uploads = self._tenant, self._uploads
        if uploads.total() >= MOST_UPLOADS or (tenant and uploads[tenant] >= MOST_OF_A_TENANT):
            raise QueueFull(
                "too many adapters are being uploaded: try again when one is through", retry_after=5.0
            )
        uploads[tenant] += 1
        try:
            limits = (self._store.max_bytes, self._settings.max_source_bytes, most)
            limit = min(each for each in limits if each is not None)
            upload = await asyncio.to_thread(self._store.receive, limit)
            try:
                yield upload
            finally:
                await asyncio.shield(asyncio.to_thread(upload.discard))
        finally:
            uploads[tenant] -= 1

    async def digest_of(self, offer: Offer, caller: Caller) -> str | None:
        """Return the digest of the files that are offered, without keeping them; None: only a download would tell."""
        source = await self.work(lambda: self._finding.find(offer))
        if not source.is_remote:
            return await self.work(lambda: self._digest(source))
        if not self._known:
            return None
        _, identity = await caller.unless_left(asyncio.ensure_future(self._identify(offer, caller)))
        return self._known.get((source.label, identity))

    def close(self) -> None:
        """Start no more downloads."""
        self._downloaders.shutdown(wait=False, cancel_futures=True)

    async def is_intact(self, digest: str) -> bool:
        """Return whether the stored files of ``digest`` are there and unaltered."""
        return await self.work(lambda: self._store.is_intact(digest))

    async def release(self, digest: str) -> None:
        """Delete the files of ``digest`` unless someone serves or prepares it."""
        async with self._digests.hold(digest):
            if not self._served(digest) and all(flight.digest != digest for flight in self._flights.values()):
                with contextlib.suppress(OSError):  # what stays is swept at the next start
                    await asyncio.to_thread(self._store.remove, digest)

    def inspect(self, digest: str) -> AdapterOutline:
        """Check the stored files as far as their headers go (blocking). Raises AdapterError."""
        settings = self._settings
        directory = self._store.path_of(digest)
        return inspect_adapter(
            directory,
            settings.modules,
            max_rank=settings.max_rank,
            vocab_size=settings.vocab_size,
            vocabulary=settings.vocabulary,
            dtype=settings.dtype,
        )

    def read(self, digest: str) -> AdapterWeights:
        """Read the stored weights (blocking), hashing them if this process never did. Raises AdapterError."""
        directory = self._store.verify(digest)
        try:
            return self._read(directory, digest).weights
        except (AdapterError, OSError):
            self._store.distrust(digest)
            raise

    def _rests(self) -> Rests:
        """Return what the thread that calls this, and works for nobody's request, is to call between pieces."""
        return Rests(lambda: self._settings.is_busy() and not self._awaited)

    def _digest(self, source: Source) -> str | None:
        rests = self._rests()
        return source.digest(self._store.max_bytes, lambda done, total: rests())

    async def _identify(self, offer: Offer, caller: Caller) -> tuple[Source, Hashable]:
        source = await self.work(lambda: self._finding.find(offer))
        caller.progress = Progress(is_remote=source.is_remote)
        identity = await self._fetching(source, lambda: source.identify(self._most(source)))
        return source, identity

    def _most(self, source: Source) -> int:
        """Return how many bytes an adapter may have: of what comes from elsewhere the operator says it."""
        most = self._store.max_bytes
        return min(most, self._settings.max_source_bytes) if source.is_remote else most

    async def _fetching(self, source: Source, blocking: Callable[[], T]) -> T:
        """Run ``blocking`` where it holds up none but those that wait for hosts too."""
        if not source.is_remote:
            return await self.work(blocking)
        async with self._downloads.slot(self._tenant):
            return await asyncio.get_running_loop().run_in_executor(self._downloaders, blocking)

    async def _prepare(self, flight: _Flight, source: Source) -> Prepared:
        def stage() -> StagedAdapter:
            flight.progress.enter("downloading" if source.is_remote else "copying")
            flight.heard(0, None)
            rests = self._rests()

            def heard(done: int, total: int | None) -> None:
                flight.heard(done, total)
                if not source.is_remote:
                    rests()

            return self._store.stage(source, heard, self._most(source))

        staged = await self._fetching(source, stage)
        flight.digest = staged.digest
        flight.progress.enter("checking")
        async with self._digests.hold(staged.digest):
            prepared = await self.work(lambda: self._admit(staged))
        if source.is_remote:
            self._known[source.label, staged.identity] = staged.digest
            while len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return prepared

    async def _wind_up(self, flight: _Flight) -> None:
        """Have a preparation that nobody uses any more leave nothing behind."""
        assert flight.task is not None
        if flight.task.done():
            if flight.digest is not None:
                await self.release(flight.digest)
            return
        flight.is_stopped = True
        self._spawn(self._wait_and_release(flight))

    async def _wait_and_release(self, flight: _Flight) -> None:
        assert flight.task is not None
        await asyncio.wait((flight.task,))
        flight.task.exception()  # heard
        if flight.digest is not None:
            await self.release(flight.digest)

    def _admit(self, staged: StagedAdapter) -> Prepared:
        """Check the staged copy, and publish it only then."""
        settings = self._settings
        try:
            loaded = self._read(staged.path, staged.digest, self._rests())
            settings.check_text(staged.path, loaded.text)
            self._store.publish(staged)
        finally:
            self._store.discard(staged)
        weights = loaded.weights
        rank = weights.rank or loaded.spec.rank  # of one that changes embedding and head alone
        return Prepared(staged.digest, loaded.spec, rank, loaded.text, weights, loaded.trained_on)

    def _read(self, directory: Path, digest: str, between: Between = go_on) -> LoadedAdapter:
        settings = self._settings
        norms = contextlib.nullcontext() if settings.norms is None else settings.norms.of(digest)
        with norms as base:
            return read_adapter(
                directory,
                settings.modules,
                max_rank=settings.max_rank,
                dtype=settings.dtype,
                vocab_size=settings.vocab_size,
                vocabulary=settings.vocabulary,
                digest=digest,
                base=base,
                between=between,
            )


def reason_of(error: AdapterError | OSError) -> str:
    """Return an error's text without the paths of this machine."""
    return str(error) if isinstance(error, AdapterError) else f"its files can't be read: {error.strerror}"
