"""The adapters that a running server knows: names to ids, and their whole life on the way in, over and out.

Lives on the event loop; whatever reads or hashes files runs in threads (server/catalog/intake.py). Every
change is an operation of its own that no caller can cut short: if the caller leaves, the operation notices at
its next step, undoes what it did, and nobody sees a half-made adapter. Touches no tensors and knows no HTTP.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TypeVar

from manylora.adapters.errors import AdapterError
from manylora.adapters.mixtures import MixturePart
from manylora.adapters.names import check_name, name_taken
from manylora.adapters.reader import AdapterOutline
from manylora.adapters.records import AdapterRecord, MixtureRecord
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.upload import Upload
from manylora.adapters.store import AdapterStore
from manylora.adapters.types import FreedAdapter
from manylora.server.catalog.intake import AdapterIntake, KeyedLocks, Prepared, reason_of
from manylora.server.catalog.mixtures import Mixtures
from manylora.server.catalog.names import KnownNames
from manylora.server.catalog.operations import Caller, Operations
from manylora.server.catalog.progress import Progress
from manylora.server.catalog.quota import Quota, Quotas
from manylora.server.catalog.registrations import Registration, Registrations
from manylora.server.catalog.seen import Sees
from manylora.server.catalog.serving import Entry, Serving, new_entry
from manylora.server.catalog.types import (
    AdapterEngine,
    CatalogObserver,
    CatalogSettings,
    MixtureEntry,
    PutOutcome,
    RestoreReport,
    SilentObserver,
    Wishes,
)

T = TypeVar("T")
Src = str | Offer
"""A source as a caller names it, or with what else goes with it."""
Admission = Callable[[Entry | None, str | None], None]
"""Raises if weights may not be put under a name: given what the name means now and their digest, if it is known."""


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
        self._engine = engine
        self._registry = registry
        self._store = store
        self._base_names = frozenset(settings.base_names)
        self._observer: CatalogObserver = observer or SilentObserver()
        self._quotas = Quotas(store)
        self._quota: Quota | None = None
        self._leaving: set[Entry] = set()
        """Out of service, but running sequences may still need their files."""
        self._names = KeyedLocks()
        self._operations = Operations()
        self.registrations = Registrations()
        """Those under way, and failed ones that nobody waited for."""
        self._intake = AdapterIntake(store, settings, self._serves, self._operations.spawn)
        self._serving = Serving(engine, registry, self._intake, self._observer)
        self._mixtures = Mixtures(
            registry, settings, self._entries, self._names, self._operations, self.usage
        )

    def managed_by(self, sees: Sees, quota: Quota) -> "AdapterCatalog":
        """Return the catalog as a tenant manages it: seen as ``seen_by`` says, filled from a folder of its own.

        The folder is the adapter root's of the tenant's name. Which names are the tenant's to change is not asked here.
        """
        managed = self.seen_by(sees)
        managed._intake = self._intake.below(quota.tenant)
        managed._mixtures = managed._mixtures.below(quota.tenant)
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

    async def delete(self, name: str, *, abort: bool = False) -> tuple[AdapterRecord, FreedAdapter]:
        """Refuse new requests, wait for running ones (or abort them), give the memory back and say how much.

        Once begun it goes through, even if the caller leaves. The name is free as soon as requests are
        refused. Raises UnknownAdapter.
        """
        return await self._operations.run(lambda caller: self._delete(caller, name, abort))

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
        records, swept = await asyncio.to_thread(self._recall)
        found = await asyncio.to_thread(lambda: [(record, self._examine(record)) for record in records])
        for record, outline in found:
            entry = await self._serving.restore(record, outline)
            self._entries[record.name] = entry
        gone = {name: entry.reason for name, entry in self._entries.items() if entry.reason is not None}
        mixtures = {entry.record.name: entry.reason for entry in await self._mixtures.restore()}
        return RestoreReport(len(self._entries) - len(gone), gone, swept, mixtures)

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

    # One operation after the other per name

    async def _run_put(
        self,
        name: str,
        src: Src,
        wishes: Wishes,
        admit: Admission,
        registration: Registration | None = None,
    ) -> PutOutcome:
        offer = Offer(src) if isinstance(src, str) else src
        registration = registration or self.registrations.open(name, str(offer))
        with self.registrations.running(registration):
            check_name(name, reserved=self._base_names)
            self._mixtures.check_free(name)
            return await self._operations.run(
                lambda caller: self._put(caller, name, offer, wishes, admit), registration.caller
            )

    async def _put(
        self, caller: Caller, name: str, offer: Offer, wishes: Wishes, admit: Admission
    ) -> PutOutcome:
        start = time.monotonic()
        same = await self._already_served(caller, name, offer, wishes, admit)
        if same is not None:
            return PutOutcome(same, is_new=False)
        async with self._intake.prepared(offer, caller) as prepared, self._names.hold(name):
            self._mixtures.check_free(name)
            old = self._entries.get(name)
            admit(old, prepared.digest)
            if old is not None and old.record.digest == prepared.digest:
                return PutOutcome(await self._keep(caller, old, wishes, prepared), is_new=False)
            async with self._room_for(name, prepared):
                record = await self._introduce(caller, name, str(offer), prepared, wishes, old)
                self._entries[name] = new_entry(record, prepared)
            if old is not None:
                self._leaving.add(old)
                self._operations.spawn(self._retire_in_background(old))
        self._mixtures.follow(name)
        seconds = time.monotonic() - start
        if old is None:
            self._observer.loaded(record, seconds, prepared.weights.nbytes)
            return PutOutcome(record, is_new=True)
        self._observer.swapped(old.record, record, seconds)
        return PutOutcome(record, is_new=True, replaced=old.record)

    def _room_for(self, name: str, prepared: Prepared) -> contextlib.AbstractAsyncContextManager[None]:
        """Hold room in the tenant's namespace. Raises NamespaceFull on entry."""
        if self._quota is None:
            return contextlib.nullcontext()
        return self._quotas.claimed(self._quota, name, self._entries, prepared)

    async def _already_served(
        self, caller: Caller, name: str, offer: Offer, wishes: Wishes, admit: Admission
    ) -> AdapterRecord | None:
        """Spare the copy and the read when a name gets the weights that it has, and their files are whole."""
        entry = self._entries.get(name)
        admit(entry, None)
        if entry is None or entry.reason is not None:
            return None
        digest = await self._intake.digest_of(offer, caller)
        admit(entry, digest)
        if digest is None or digest != entry.record.digest or not await self._intake.is_intact(digest):
            return None
        async with self._names.hold(name):
            if self._entries.get(name) is not entry:
                return None
            return await self._keep(caller, entry, wishes)

    async def _delete(self, caller: Caller, name: str, abort: bool) -> tuple[AdapterRecord, FreedAdapter]:
        async with self._names.hold(name):
            caller.check()
            entry = self._existing(name)
            # It answers until the registry has let it go, which may fail: then nothing has happened.
            record = await asyncio.to_thread(self._registry.retire, name)
            del self._entries[name]
            self._leaving.add(entry)
        return record, await self._take_out(entry, abort=abort)

    # Steps of an operation

    async def _introduce(
        self,
        caller: Caller,
        name: str,
        src: str,
        prepared: Prepared,
        wishes: Wishes,
        old: Entry | None,
    ) -> AdapterRecord:
        """Mint an id, give the weights to the engine, make the record active: all of it or nothing."""
        caller.check()
        caller.progress = Progress("loading", caller.progress.done, caller.progress.total)
        preload, pin = wishes.of(None if old is None else old.record)
        targets = prepared.spec.named_targets()
        pending = await asyncio.to_thread(
            self._registry.reserve,
            name,
            prepared.digest,
            source=src,
            rank=prepared.rank,
            targets=targets,
            pinned=pin,
            preload=preload,
        )
        engine_has_it = False
        try:
            caller.check()
            await self._serving.hand_over(pending, prepared.weights)
            engine_has_it = True
            caller.check()
            return await asyncio.to_thread(self._registry.activate, pending)
        except BaseException:
            await self._undo(pending, engine_has_it=engine_has_it)
            raise

    async def _undo(self, pending: AdapterRecord, *, engine_has_it: bool) -> None:
        """Take back an introduction; what can't be taken back is reported, and gone at the next start."""
        try:
            if engine_has_it:
                await self._engine.remove_adapter(pending.id, abort=True)
            await asyncio.to_thread(self._registry.abandon, pending.id)
        except Exception as error:
            self._observer.failed("undo", pending.name, error)

    async def _keep(
        self, caller: Caller, entry: Entry, wishes: Wishes, prepared: Prepared | None = None
    ) -> AdapterRecord:
        """Keep an adapter as ``wishes`` say; one that is unavailable is served again, now that its files are back."""
        caller.check()
        record = entry.record
        if entry.reason is not None:
            assert prepared is not None, "what is unavailable is prepared anew"
            await self._serving.hand_over(record, prepared.weights)  # no request ever used its id
            entry = new_entry(record, prepared)
            self._entries[record.name] = entry
            self._mixtures.follow(record.name)
        kept = await self._serving.keep(record, wishes)
        if kept != record:
            self._entries[record.name] = replace(entry, record=kept)
        return kept

    async def _retire_in_background(self, old: Entry) -> None:
        try:
            await self._take_out(old, abort=False)
        except Exception as error:
            self._observer.failed("retire", old.record.name, error)

    async def _take_out(self, entry: Entry, *, abort: bool) -> FreedAdapter:
        """Give back an adapter's memory and, if no other uses them, its files."""
        start = time.monotonic()
        freed = FreedAdapter(0, 0, 0, 0)
        if entry.reason is None:
            freed = await self._engine.remove_adapter(entry.record.id, abort=abort)
        self._leaving.discard(entry)
        self._observer.removed(entry.record, freed, time.monotonic() - start)
        await self._intake.release(entry.record.digest)
        # Now that the files are gone: what the record took of the space for deleting can be had again.
        await asyncio.to_thread(self._registry.keep_space)
        return freed

    # Start-up

    def _recall(self) -> tuple[Sequence[AdapterRecord], int]:
        self._registry.drop_pending()
        return self._registry.active(), self._store.sweep(self._registry.digests_in_use())

    def _examine(self, record: AdapterRecord) -> AdapterOutline | str:
        try:
            check_name(record.name, reserved=self._base_names)
            self._store.nbytes(record.digest)  # known from here on, without asking the disk on the loop
            return self._intake.inspect(record.digest)
        except (AdapterError, OSError) as error:
            return reason_of(error)

    # Look-ups

    def _serves(self, digest: str) -> bool:
        return any(entry.record.digest == digest for entry in (*self._entries.values(), *self._leaving))
