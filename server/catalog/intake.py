"""From a source directory to checked weights in the store: one copy and one read, however many ask at once.

Works in threads, a few at a time; knows no names and no engine. Files that nobody wants any more are deleted
here too, since publishing and deleting one digest must not overlap.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Hashable
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from manylora.adapters.base_form import BaseForm
from manylora.adapters.errors import AdapterError
from manylora.adapters.reader import AdapterOutline, LoadedAdapter, inspect_adapter, read_adapter
from manylora.adapters.source import Source, operator_source, resolve_source
from manylora.adapters.spec import AdapterSpec
from manylora.adapters.store import AdapterStore, StagedAdapter
from manylora.adapters.tokens import AdapterText
from manylora.adapters.types import AdapterWeights
from manylora.server.catalog.types import CatalogSettings

T = TypeVar("T")


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

    users: set[object] = field(default_factory=set)
    digest: str | None = None
    task: "asyncio.Task[Prepared] | None" = None


class AdapterIntake:
    """Prepares adapters and keeps their files while anyone wants them. Lives on the event loop."""

    def __init__(self, store: AdapterStore, settings: CatalogSettings, served: Callable[[str], bool]) -> None:
        """``served`` says whether an adapter with that digest is being served or still runs."""
        self._store = store
        self._settings = settings
        self._served = served
        self._slots = asyncio.Semaphore(settings.workers)
        self._digests = KeyedLocks()
        self._flights: dict[Hashable, _Flight] = {}

    def below(self, folder: str) -> "AdapterIntake":
        """Return the intake of whoever may name what lies in this folder of the adapter root alone."""
        narrow = copy(self)
        root = self._settings.adapter_root / folder
        narrow._settings = replace(self._settings, adapter_root=root, trusted_sources=frozenset())
        return narrow

    async def work(self, blocking: Callable[[], T]) -> T:
        """Run ``blocking`` in a thread, with at most ``workers`` others."""
        async with self._slots:
            return await asyncio.to_thread(blocking)

    @contextlib.asynccontextmanager
    async def prepared(self, src: str) -> AsyncIterator[Prepared]:
        """Copy, check and publish the adapter at ``src``; its files stay at least until the block ends.

        Callers with the same unchanged files share one preparation. Not to be cancelled inside (the catalog's
        operations aren't). Raises what resolve_source, AdapterStore and read_adapter raise.
        """
        key = await self.work(lambda: self._identify(src))
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            flight.task = asyncio.create_task(self._prepare(flight, key[0]))
        user = object()
        flight.users.add(user)
        try:
            assert flight.task is not None
            yield await flight.task
        finally:
            flight.users.discard(user)
            if not flight.users:
                del self._flights[key]
                if flight.digest is not None:
                    await self.release(flight.digest)

    async def digest_at(self, src: str) -> str:
        """Return the digest of the files at ``src`` without copying them."""
        return await self.work(lambda: self._digest_at(src))

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
            directory, settings.modules, max_rank=settings.max_rank, vocab_size=settings.vocab_size
        )

    def read(self, digest: str) -> AdapterWeights:
        """Read the stored weights (blocking), hashing them if this process never did. Raises AdapterError."""
        directory = self._store.verify(digest)
        try:
            return self._read(directory, digest).weights
        except (AdapterError, OSError):
            self._store.distrust(digest)
            raise

    def _source(self, src: str) -> Source:
        if src in self._settings.trusted_sources:
            return operator_source(Path(src))
        return resolve_source(src, self._settings.adapter_root)

    def _identify(self, src: str) -> tuple[Source, Hashable]:
        source = self._source(src)
        with self._store.open(source) as files:
            return source, files.fingerprint

    def _digest_at(self, src: str) -> str:
        with self._store.open(self._source(src)) as files:
            return files.read_through(lambda name: lambda chunk: None)

    async def _prepare(self, flight: _Flight, source: Source) -> Prepared:
        staged = await self.work(lambda: self._store.stage(source))
        flight.digest = staged.digest
        async with self._digests.hold(staged.digest):
            return await self.work(lambda: self._admit(staged))

    def _admit(self, staged: StagedAdapter) -> Prepared:
        """Check the staged copy, and publish it only then."""
        settings = self._settings
        try:
            loaded = self._read(staged.path, staged.digest)
            settings.check_text(staged.path, loaded.text)
            self._store.publish(staged)
        finally:
            self._store.discard(staged)
        weights = loaded.weights
        return Prepared(staged.digest, loaded.spec, weights.rank, loaded.text, weights, loaded.trained_on)

    def _read(self, directory: Path, digest: str) -> LoadedAdapter:
        settings = self._settings
        norms = contextlib.nullcontext() if settings.norms is None else settings.norms.of(digest)
        with norms as base:
            return read_adapter(
                directory,
                settings.modules,
                max_rank=settings.max_rank,
                dtype=settings.dtype,
                vocab_size=settings.vocab_size,
                digest=digest,
                base=base,
            )


def reason_of(error: AdapterError | OSError) -> str:
    """Return an error's text without the paths of this machine."""
    return str(error) if isinstance(error, AdapterError) else f"its files can't be read: {error.strerror}"
