"""What is done with the versions that a name has: going back, canaries, letting one go. Lives on the event loop.

Each is an operation of its own that no caller can cut short, as in changes.py, and one transaction of the registry.
"""

from collections.abc import Callable
from dataclasses import dataclass

from manylora.adapters.lineage import Lineage
from manylora.adapters.records import AdapterRecord
from manylora.adapters.sources.finding import Offer
from manylora.server.catalog.changes import Changes
from manylora.server.catalog.operations import Caller
from manylora.server.errors import AdapterUnavailable

How = Callable[[Lineage], Lineage]


@dataclass(frozen=True, slots=True)
class Versions:
    """Operations on the versions of a name that is there. Each raises UnknownAdapter, and what the registry raises."""

    changes: Changes

    async def roll_back(self, caller: Caller, name: str, version: int | None) -> None:
        """Make another version the active one again; None: end the canary or, without one, go to the one before.

        Raises VersionConflict if there is nothing to go back to, UnknownVersion, AdapterUnavailable,
        and NamespaceFull.
        """
        async with self.changes.names.hold(name):
            lineage = self._lineage(name)
            if version is None and lineage.canary is not None:
                await self._change(caller, name, Lineage.aborted)
                return
            target = lineage.before() if version is None else lineage.get(version)
            planned = lineage.back_to(target.version)
            async with self.changes.room_as(planned):
                await self._take_over(caller, lineage, target, lambda found: found.back_to(target.version))
        self.changes.mixtures.follow(name)

    async def try_version(self, caller: Caller, name: str, version: int, share: float) -> None:
        """Have a kept version answer a share of the requests; the canary is given another share.

        Raises VersionConflict for the active version, UnknownVersion, InvalidAdapter, AdapterUnavailable, and
        NamespaceFull.
        """
        async with self.changes.names.hold(name):
            lineage = self._lineage(name)
            planned = lineage.trying(version, share)
            self._check_available(lineage.get(version))
            async with self.changes.room_as(planned):
                await self._change(caller, name, lambda found: found.trying(version, share))

    async def try_source(self, caller: Caller, name: str, offer: Offer, share: float) -> bool:
        """Have the adapter that is offered answer a share of the requests; return whether that made a version.

        The canary's own weights change its share alone. Raises VersionConflict for the active version's weights, and
        what AdapterCatalog.register raises.
        """
        changes = self.changes
        changes.existing(name)
        async with changes.intake.prepared(offer, caller) as prepared, changes.names.hold(name):
            lineage = self._lineage(name)
            canary = lineage.canary
            if canary is not None and canary.digest == prepared.digest:
                self._check_available(canary)
                await self._change(caller, name, lambda found: found.trying(canary.version, share))
                return False
            if lineage.active.digest == prepared.digest:
                lineage.trying(lineage.active.version, share)
            async with changes.room_for(name, prepared, share=share) as keep:
                registry = changes.service.registry
                await changes.service.introduce(
                    caller,
                    name,
                    str(offer),
                    prepared,
                    lambda pending: registry.activate(pending, keep=keep, share=share),
                    (False, False),
                )
        return True

    async def promote(self, caller: Caller, name: str) -> None:
        """Make the canary the active version. Raises VersionConflict without one, and AdapterUnavailable."""
        async with self.changes.names.hold(name):
            lineage = self._lineage(name)
            target = lineage.get(lineage.promoted().active.version)
            await self._take_over(caller, lineage, target, Lineage.promoted)
        self.changes.mixtures.follow(name)

    async def abort(self, caller: Caller, name: str) -> None:
        """Have the canary answer nothing that doesn't ask for it. Raises VersionConflict without one."""
        async with self.changes.names.hold(name):
            await self._change(caller, name, Lineage.aborted)

    async def forget(self, caller: Caller, name: str, version: int) -> None:
        """Let a kept version go, once running requests have ended. Raises VersionConflict, UnknownVersion."""
        async with self.changes.names.hold(name):
            await self._change(caller, name, lambda found: found.without(version))

    async def _take_over(self, caller: Caller, lineage: Lineage, target: AdapterRecord, how: How) -> None:
        """Have a version be the active one, kept in memory as that was; until it can be, nothing has changed."""
        self._check_available(target)
        serving, active = self.changes.service.serving, lineage.active
        if active.preload or active.pinned:
            await serving.ready(target, pinned=active.pinned, preload=active.preload)
        try:
            await self._change(caller, target.name, how)
        except BaseException:
            if active.preload or active.pinned:
                await serving.rest(target)
            raise

    async def _change(self, caller: Caller, name: str, how: How) -> None:
        self._lineage(name)
        caller.check()
        await self.changes.service.change(name, lambda found: how(found).trimmed(self.changes.keep))

    def _lineage(self, name: str) -> Lineage:
        self.changes.existing(name)
        found = self.changes.service.served.lineage(name)
        assert found is not None, "it exists"
        return found

    def _check_available(self, record: AdapterRecord) -> None:
        entry = self.changes.service.served.version(record.name, record.version)
        assert entry is not None, "it is in the lineage"
        if entry.reason is not None:
            raise AdapterUnavailable(
                f"version {record.version} of {record.name!r} can't be served: {entry.reason}"
            )
