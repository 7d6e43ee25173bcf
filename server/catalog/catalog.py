"""The adapters that a running server knows: names to ids, and their whole life on the way in, over and out.

Lives on the event loop; whatever reads or hashes files runs in threads (server/catalog/intake.py). What changes are
made of is in changes.py and versions.py. Touches no tensors and knows no HTTP.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

from manylora.adapters.errors import AdapterError
from manylora.adapters.lineage import Lineage
from manylora.adapters.mixtures import MixturePart
from manylora.adapters.names import check_name, name_taken, with_version
from manylora.adapters.reader import AdapterOutline
from manylora.adapters.records import AdapterRecord, AdapterState, MixtureRecord
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.upload import Upload
from manylora.adapters.store import AdapterStore
from manylora.adapters.types import FreedAdapter
from manylora.server.catalog.changes import Admission, Changes
from manylora.server.catalog.intake import AdapterIntake, KeyedLocks, reason_of
from manylora.server.catalog.mixtures import Mixtures
from manylora.server.catalog.names import KnownNames
from manylora.server.catalog.operations import Caller, Operations
from manylora.server.catalog.quota import Quota, Quotas
from manylora.server.catalog.registrations import Registration, Registrations
from manylora.server.catalog.seen import Sees
from manylora.server.catalog.service import Service
from manylora.server.catalog.serving import Entry, Serving
from manylora.server.catalog.types import (
    AdapterEngine,
    CatalogEntry,
    CatalogObserver,
    CatalogSettings,
    MixtureEntry,
    PutOutcome,
    RestoreReport,
    SilentObserver,
    Wishes,
)
from manylora.server.catalog.versions import Versions

T = TypeVar("T")
Src = str | Offer
"""A source as a caller names it, or with what else goes with it."""


class AdapterCatalog(KnownNames):
    """Names, ids and files of all adapters, in step with the engine. Make it on the loop, then ``restore``.

    Takes over ``registry`` and closes it.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        registry: AdapterRegistry,
        store: AdapterStore,
        settings: CatalogSettings,
        observer: CatalogObserver | None = None,
    ) -> None:
        super().__init__(engine, settings, store.nbytes)
        self._registry = registry
        self._store = store
        self._keep_versions = settings.keep_versions
        self._quota: Quota | None = None
        self._base_names = frozenset(settings.base_names)
        observer = observer or SilentObserver()
        self._operations = Operations()
        self.registrations = Registrations()
        """Those under way, and failed ones that nobody waited for."""
        intake = AdapterIntake(store, settings, self._needs, self._operations.spawn)
        self._intake = intake
        self._serving = Serving(engine, registry, intake, observer)
        names = KeyedLocks()
        self._mixtures = Mixtures(registry, settings, self._served, names, self._operations, self.usage)
        service = Service(registry, self._serving, intake, self._served, self._operations, observer)
        self._changes = Changes(
            service, intake, self._mixtures, self._existing, names, Quotas(store), settings.keep_versions
        )

    def managed_by(self, sees: Sees, quota: Quota) -> "AdapterCatalog":
        """Return the catalog as a tenant manages it: seen as ``seen_by`` says, filled from a folder of its own.

        The folder is the adapter root's of the tenant's name. Which names are the tenant's to change is not asked here.
        """
        managed = self.seen_by(sees)
        managed._mixtures = managed._mixtures.below(quota.tenant)
        managed._changes = self._changes.below(quota, managed._mixtures, managed._existing)
        managed._intake = managed._changes.intake
        managed._quota = quota
        return managed

    async def register(
        self,
        name: str,
        src: Src,
        *,
        preload: bool | None = None,
        pin: bool | None = None,
        registration: Registration | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Serve the adapter at ``src`` as ``name``; return its record and whether it is new.

        The same weights under the same name again keep their id; ``preload`` and ``pin`` take effect, and stored
        files that are damaged are replaced. Raises AdapterNameTaken for other weights, what the reader and the
        store raise, and AdapterUnavailable.
        """

        def free_or_the_same(entry: Entry | None, digest: str | None) -> None:
            if entry is not None and digest is not None and entry.record.digest != digest:
                raise name_taken(name)

        outcome = await self._run_put(name, src, Wishes(preload, pin), free_or_the_same, registration)
        return outcome.record, outcome.is_new

    async def replace(
        self,
        name: str,
        src: Src,
        *,
        preload: bool | None = None,
        pin: bool | None = None,
        registration: Registration | None = None,
    ) -> AdapterRecord:
        """Serve the adapter at ``src`` as the next version of ``name``; return the record in force.

        As ``put``, but raises UnknownAdapter for a name that is free.
        """

        def in_use(entry: Entry | None, digest: str | None) -> None:
            self._existing(name)

        return (await self._run_put(name, src, Wishes(preload, pin), in_use, registration)).record

    async def put(
        self, name: str, src: Src, *, preload: bool | None = None, pin: bool | None = None
    ) -> PutOutcome:
        """Serve the adapter at ``src`` as ``name``, whatever the name meant before.

        Calls for one name take effect one after the other. New requests use the new version once it is ready;
        running ones finish on the old one, which then goes in the background (``settled``). None keeps the old
        version's choice. The same weights keep their id. Raises what ``register`` raises but AdapterNameTaken.
        """
        return await self._run_put(name, src, Wishes(preload, pin), lambda entry, digest: None)

    async def digest_of(self, src: Src) -> str | None:
        """Return the digest of the files at ``src``; None: only a download would tell. Raises as ``register``."""
        offer = _offer(src)
        return await self._operations.run(lambda caller: self._intake.digest_of(offer, caller))

    async def delete(self, name: str, *, abort: bool = False) -> tuple[AdapterRecord, FreedAdapter]:
        """Refuse new requests, wait for running ones (or abort them), give the memory back and say how much.

        Once begun it goes through, even if the caller leaves. The name is free as soon as requests are
        refused. Raises UnknownAdapter.
        """
        return await self._operations.run(lambda caller: self._changes.delete(caller, name, abort=abort))

    async def roll_back(self, name: str, version: int | None = None) -> None:
        """Make another version the active one again; see Versions.roll_back."""
        await self._operations.run(lambda caller: self._versions.roll_back(caller, name, version))

    async def try_version(self, name: str, version: int, share: float) -> None:
        """Have a kept version answer a share of the requests for its name; see Versions.try_version."""
        await self._operations.run(lambda caller: self._versions.try_version(caller, name, version, share))

    async def try_source(
        self, name: str, src: Src, share: float, registration: Registration | None = None
    ) -> bool:
        """Have a new version answer a share of the requests for its name; see Versions.try_source."""
        offer = _offer(src)
        registration = registration or self.registrations.open(name, str(offer), share=share)
        with self.registrations.running(registration):
            self._existing(name)
            return await self._operations.run(
                lambda caller: self._versions.try_source(caller, name, offer, share), registration.caller
            )

    async def promote(self, name: str) -> None:
        """Make the canary the active version; see Versions.promote."""
        await self._operations.run(lambda caller: self._versions.promote(caller, name))

    async def abort_canary(self, name: str) -> None:
        """Keep the canary, and have it answer nothing by itself; see Versions.abort."""
        await self._operations.run(lambda caller: self._versions.abort(caller, name))

    async def forget_version(self, name: str, version: int) -> None:
        """Let a kept version go; see Versions.forget."""
        await self._operations.run(lambda caller: self._versions.forget(caller, name, version))

    async def while_it_stays(self, name: str, work: Callable[[CatalogEntry], Awaitable[T]]) -> T:
        """Do something with what a name means, while nothing changes that. Raises UnknownAdapter."""

        async def held(caller: Caller) -> T:
            async with self._changes.names.hold(name):
                caller.check()
                return await work(self.get(name))

        return await self._operations.run(held)

    async def register_mixture(self, name: str, parts: Sequence[MixturePart]) -> tuple[MixtureEntry, bool]:
        """Serve a mixture under a free name; return it and whether it is new. Raises as Mixtures.register does."""
        return await self._mixtures.register(name, parts)

    async def replace_mixture(self, name: str, parts: Sequence[MixturePart]) -> MixtureEntry:
        """Give a mixture other parts or weights, for new requests. Raises as Mixtures.replace does."""
        return await self._mixtures.replace(name, parts)

    async def put_mixture(self, name: str, parts: Sequence[MixturePart]) -> tuple[MixtureEntry, bool]:
        """Do the one or the other, whatever mixture had the name. Raises as Mixtures.put does."""
        return await self._mixtures.put(name, parts)

    async def delete_mixture(self, name: str) -> MixtureRecord:
        """Take a mixture's name out of service; running requests finish. Raises UnknownAdapter."""
        return await self._mixtures.delete(name)

    async def restore(self) -> RestoreReport:
        """Bring back what the registry knows, without reading weights that are neither pinned nor preloaded.

        What is missing or damaged in the store becomes unavailable with its reason; the start goes on.
        """
        lineages, swept = await asyncio.to_thread(self._recall)
        records = [record for lineage in lineages for record in lineage.records]
        found = await asyncio.to_thread(lambda: {record.id: self._examine(record) for record in records})
        for lineage in lineages:
            entries = [await self._serving.restore(each, found[each.id]) for each in lineage.records]
            self._served.follow(lineage, *entries)
        active = self._served.active.values()
        gone = {_told(entry.record): entry.reason for entry in self._served.everything() if entry.reason}
        mixtures = {entry.record.name: entry.reason for entry in await self._mixtures.restore()}
        restored = sum(entry.reason is None for entry in active)
        return RestoreReport(restored, gone, swept, mixtures)

    def receiving(self) -> contextlib.AbstractAsyncContextManager[Upload]:
        """Take an upload, which may be registered within the block. Raises QueueFull and StoreFull on entry."""
        return self._intake.receiving(None if self._quota is None else self._quota.nbytes)

    def in_background(self, work: Coroutine[object, object, T]) -> "asyncio.Task[T]":
        """Do something to the catalog that nobody waits for; ``settled`` and ``close`` do."""
        return self._operations.spawn(work)

    async def settled(self) -> None:
        """Wait until every operation has ended and every old version is gone."""
        await self._operations.settled()

    async def close(self) -> None:
        """Refuse new operations, wait for those under way, and close the registry."""
        self.registrations.end_downloads()
        await self._operations.close()
        self._intake.close()
        await asyncio.to_thread(self._registry.close)

    async def _run_put(
        self,
        name: str,
        src: Src,
        wishes: Wishes,
        admit: Admission,
        registration: Registration | None = None,
    ) -> PutOutcome:
        offer = _offer(src)
        registration = registration or self.registrations.open(name, str(offer))
        with self.registrations.running(registration):
            check_name(name, reserved=self._base_names)
            self._mixtures.check_free(name)
            return await self._operations.run(
                lambda caller: self._changes.put(caller, name, offer, wishes, admit), registration.caller
            )

    @property
    def _versions(self) -> Versions:
        return Versions(self._changes)

    # Start-up

    def _recall(self) -> tuple[Sequence[Lineage], int]:
        self._registry.drop_pending()
        for lineage in self._registry.lineages():
            if lineage.trimmed(self._keep_versions) != lineage:
                self._registry.change(lineage.active.name, lambda found: found.trimmed(self._keep_versions))
        return self._registry.lineages(), self._store.sweep(self._registry.digests_in_use())

    def _examine(self, record: AdapterRecord) -> AdapterOutline | str:
        try:
            check_name(record.name, reserved=self._base_names)
            self._store.nbytes(record.digest)  # known from here on, without asking the disk on the loop
            return self._intake.inspect(record.digest)
        except (AdapterError, OSError) as error:
            return reason_of(error)

    # Look-ups

    def _needs(self, digest: str) -> bool:
        """Return whether files are served, or may still be read for requests that began with what isn't any more."""
        served = any(entry.record.digest == digest for entry in self._served.everything())
        return served or self._serving.reads(digest)


def _offer(src: Src) -> Offer:
    return Offer(src) if isinstance(src, str) else src


def _told(record: AdapterRecord) -> str:
    """Return what a restart calls a version: the active one by its name."""
    return record.name if record.state is AdapterState.ACTIVE else with_version(record.name, record.version)
