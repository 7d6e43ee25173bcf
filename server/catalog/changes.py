"""Adapters in, over and out: what putting weights under a name, and deleting it, are made of. Lives on the event loop.

Every change is an operation of its own that no caller can cut short: if the caller leaves, the operation notices at its
next step, undoes what it did, and nobody sees a half-made adapter.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from manylora.adapters.lineage import Lineage
from manylora.adapters.records import AdapterRecord, AdapterState
from manylora.adapters.sources.finding import Offer
from manylora.adapters.types import FreedAdapter
from manylora.server.catalog.intake import AdapterIntake, KeyedLocks, Prepared
from manylora.server.catalog.mixtures import Mixtures
from manylora.server.catalog.operations import Caller
from manylora.server.catalog.quota import Quota, Quotas, answering_rows
from manylora.server.catalog.service import Service
from manylora.server.catalog.serving import Entry, new_entry
from manylora.server.catalog.types import PutOutcome, Wishes

Admission = Callable[[Entry | None, str | None], None]
"""Raises if weights may not be put under a name: given what the name means now and their digest, if it is known."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Operations on names. A tenant's reads from its own folder and has a quota."""

    service: Service
    intake: AdapterIntake
    mixtures: Mixtures
    existing: Callable[[str], Entry]
    """Returns what a name means to who changes it. Raises UnknownAdapter with the names that those may know."""
    names: KeyedLocks
    quotas: Quotas
    keep: int
    """Old versions that a name keeps."""
    quota: Quota | None = None

    def below(self, quota: Quota, mixtures: Mixtures, existing: Callable[[str], Entry]) -> "Changes":
        """Return them as a tenant makes them."""
        intake = self.intake.below(quota.tenant)
        return replace(self, intake=intake, mixtures=mixtures, existing=existing, quota=quota)

    async def put(
        self, caller: Caller, name: str, offer: Offer, wishes: Wishes, admit: Admission
    ) -> PutOutcome:
        """Serve the adapter that is offered as ``name``, as its next version if it has one."""
        start = time.monotonic()
        service, observer = self.service, self.service.observer
        same = await self._already_served(caller, name, offer, wishes, admit)
        if same is not None:
            return PutOutcome(same, is_new=False)
        async with self.intake.prepared(offer, caller) as prepared, self.names.hold(name):
            self.mixtures.check_free(name)
            old = service.served.active.get(name)
            admit(old, prepared.digest)
            if old is not None and old.record.digest == prepared.digest:
                return PutOutcome(await self._keep(caller, old, wishes, prepared), is_new=False)
            async with self.room_for(name, prepared, share=None) as keep:
                record = await service.introduce(
                    caller,
                    name,
                    str(offer),
                    prepared,
                    lambda pending: service.registry.activate(pending, keep=keep),
                    wishes.of(None if old is None else old.record),
                )
            self.mixtures.follow(name)
            # While the name is held: what is said of a new one is said after this.
            seconds = time.monotonic() - start
            if old is None:
                observer.loaded(record, seconds, prepared.weights.nbytes)
                return PutOutcome(record, is_new=True)
            observer.swapped(old.record, record, seconds)
            return PutOutcome(record, is_new=True, replaced=old.record)

    def room_for(
        self, name: str, prepared: Prepared, *, share: float | None
    ) -> contextlib.AbstractAsyncContextManager[int]:
        """Hold room for a name's next version, or canary with ``share``; give how many old versions may be kept.

        Raises NamespaceFull on entry.
        """
        if self.quota is None:
            return contextlib.nullcontext(self.keep)
        served = self.service.served

        def plan(keep: int) -> Lineage:
            return _planned(served.lineage(name), name, prepared, share).trimmed(keep)

        return self.quotas.claimed(self.quota, name, served, plan, self.keep)

    def room_as(self, planned: Lineage) -> contextlib.AbstractAsyncContextManager[object]:
        """Hold room for what a name is to be with other versions of its own answering. Raises NamespaceFull on entry.

        Such a change brings no files; one that takes no more rows goes through, whatever is held already.
        """
        served, name = self.service.served, planned.active.name
        now = served.lineage(name)
        if self.quota is None or (now is not None and answering_rows(planned) <= answering_rows(now)):
            return contextlib.nullcontext()
        return self.quotas.claimed(self.quota, name, served, lambda keep: planned, 0)

    async def delete(self, caller: Caller, name: str, *, abort: bool) -> tuple[AdapterRecord, FreedAdapter]:
        """Take a name with all of its versions out of service, and give their memory back."""
        service = self.service
        async with self.names.hold(name):
            caller.check()
            self.existing(name)
            # It answers until the registry has let it go, which may fail: then nothing has happened.
            record = await asyncio.to_thread(service.registry.retire, name)
            gone = service.served.forget(name)
        ended = await asyncio.gather(
            *(service.take_out(entry, abort=abort) for entry in gone), return_exceptions=True
        )
        freed = [each for each in ended if isinstance(each, FreedAdapter)]
        for each in ended:
            if isinstance(each, BaseException):
                raise each
        return record, _sum_of(freed)

    async def _already_served(
        self, caller: Caller, name: str, offer: Offer, wishes: Wishes, admit: Admission
    ) -> AdapterRecord | None:
        """Spare the copy and the read when a name gets the weights that it has, and their files are whole."""
        served = self.service.served
        entry = served.active.get(name)
        admit(entry, None)
        if entry is None or entry.reason is not None:
            return None
        digest = await self.intake.digest_of(offer, caller)
        admit(entry, digest)
        if digest is None or digest != entry.record.digest or not await self.intake.is_intact(digest):
            return None
        async with self.names.hold(name):
            if served.active.get(name) is not entry:
                return None
            return await self._keep(caller, entry, wishes)

    async def _keep(
        self, caller: Caller, entry: Entry, wishes: Wishes, prepared: Prepared | None = None
    ) -> AdapterRecord:
        """Keep an adapter as ``wishes`` say; one that is unavailable is served again, now that its files are back."""
        caller.check()
        record, served = entry.record, self.service.served
        if entry.reason is not None:
            assert prepared is not None, "what is unavailable is prepared anew"
            await self.service.serving.hand_over(record, prepared.weights)  # no request ever used its id
            entry = new_entry(record, prepared)
            served.put_right(entry)
            self.mixtures.follow(record.name)
        kept = await self.service.serving.keep(record, wishes)
        if kept != record:
            served.put_right(replace(entry, record=kept))
        return kept


def _planned(lineage: Lineage | None, name: str, prepared: Prepared, share: float | None) -> Lineage:
    """Return a name's versions as they would be with the one that is prepared."""
    if lineage is None:
        return Lineage((_record(prepared, name, 1),))
    record = _record(prepared, name, max(each.version for each in lineage.records) + 1)
    joined = lineage.joined_by(record)
    if share is not None:
        return joined.trying(record.version, share)
    return joined.led_by(record.version, like=record)


def _record(prepared: Prepared, name: str, version: int) -> AdapterRecord:
    return AdapterRecord(
        0,
        name,
        version,
        prepared.digest,
        "",
        prepared.rank,
        (),
        pinned=False,
        preload=False,
        created_at=datetime.now(UTC),
        state=AdapterState.ACTIVE,
    )


def _sum_of(freed: list[FreedAdapter]) -> FreedAdapter:
    return FreedAdapter(
        sum(each.rows for each in freed),
        sum(each.device_bytes for each in freed),
        sum(each.host_bytes for each in freed),
        sum(each.aborted for each in freed),
    )
