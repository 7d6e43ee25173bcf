"""Versions into service and out of it: the registry, the engine and what names mean, in step. All of it or nothing.

For operations (changes.py, versions.py), which hold the name's lock meanwhile. Lives on the event loop.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from manylora.adapters.lineage import Lineage
from manylora.adapters.records import AdapterRecord, AdapterState
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.types import FreedAdapter
from manylora.server.catalog.intake import AdapterIntake, Prepared
from manylora.server.catalog.operations import Caller, Operations
from manylora.server.catalog.progress import Progress
from manylora.server.catalog.served import Served
from manylora.server.catalog.serving import Entry, Serving, new_entry
from manylora.server.catalog.types import CatalogObserver

Activate = Callable[[AdapterRecord], Lineage]
"""Puts a pending record into service in the registry (blocking)."""


@dataclass(frozen=True, slots=True)
class Service:
    """What operations on versions share."""

    registry: AdapterRegistry
    serving: Serving
    intake: AdapterIntake
    served: Served
    operations: Operations
    observer: CatalogObserver

    async def introduce(
        self,
        caller: Caller,
        name: str,
        src: str,
        prepared: Prepared,
        activate: Activate,
        kept: tuple[bool, bool],
    ) -> AdapterRecord:
        """Mint an id, give the weights to the engine, have the record be in service: all of it or nothing.

        ``kept``: whether it is preloaded, and pinned.
        """
        caller.check()
        caller.progress = Progress("loading", caller.progress.done, caller.progress.total)
        preload, pinned = kept
        pending = await asyncio.to_thread(
            self.registry.reserve,
            name,
            prepared.digest,
            source=src,
            rank=prepared.rank,
            targets=prepared.spec.named_targets(),
            pinned=pinned,
            preload=preload,
        )
        engine_has_it = False
        try:
            caller.check()
            await self.serving.hand_over(pending, prepared.weights)
            engine_has_it = True
            caller.check()
            lineage = await asyncio.to_thread(activate, pending)
        except BaseException:
            await self._undo(pending, engine_has_it=engine_has_it)
            raise
        await self._follow(lineage, new_entry(pending, prepared))
        return lineage.get(pending.version)

    async def change(self, name: str, how: Callable[[Lineage], Lineage]) -> Lineage:
        """Change which versions a name has, and what they are to it. Raises what ``how`` and the registry raise."""
        lineage = await asyncio.to_thread(self.registry.change, name, how)
        await self._follow(lineage)
        return lineage

    async def take_out(self, entry: Entry, *, abort: bool) -> FreedAdapter:
        """Give back an adapter's memory and, if no other uses them, its files."""
        start = time.monotonic()
        freed = FreedAdapter(0, 0, 0, 0)
        if entry.reason is None:
            freed = await self.serving.take_back(entry.record, abort=abort)
        self.observer.removed(entry.record, freed, time.monotonic() - start)
        await self.intake.release(entry.record.digest)
        # Now that the files are gone: what the record took of the space for deleting can be had again.
        await asyncio.to_thread(self.registry.keep_space)
        return freed

    async def _follow(self, lineage: Lineage, *new: Entry) -> None:
        """Have the name mean what the registry says; what gets no requests any more rests, what is gone goes."""
        before = self.served.lineage(lineage.active.name)
        gone = self.served.follow(lineage, *new)
        for entry in gone:
            self.operations.spawn(self._retire(entry))
        kept_now = {each.id for each in lineage.records if each.state is AdapterState.KEPT}
        for record in () if before is None else before.records:
            if record.id in kept_now and record.state is not AdapterState.KEPT:
                kept = self.served.version(record.name, record.version)
                if kept is not None and kept.reason is None:
                    await self.serving.rest(record)

    async def _retire(self, entry: Entry) -> None:
        try:
            await self.take_out(entry, abort=False)
        except Exception as error:
            self.observer.failed("retire", entry.record.name, error)

    async def _undo(self, pending: AdapterRecord, *, engine_has_it: bool) -> None:
        """Take back an introduction; what can't be taken back is reported, and gone at the next start."""
        try:
            if engine_has_it:
                await self.serving.take_back(pending, abort=True)
            await asyncio.to_thread(self.registry.abandon, pending.id)
        except Exception as error:
            self.observer.failed("undo", pending.name, error)
