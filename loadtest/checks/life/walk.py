"""A random walk through adapters' lives, with requests all the while, held against the model of what must be so.

Changes are made one after the other. Some meet a fault, some are left by whoever asked, some are killed in their middle
and gone on with from the disk: each ends as it must, or has changed nothing.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from manylora.adapters.errors import (
    AdapterError,
    AdapterNameTaken,
    InvalidAdapter,
    InvalidMixture,
    UnknownAdapter,
    VersionConflict,
)
from manylora.adapters.mixtures import part_weight
from manylora.adapters.names import with_version
from manylora.loadtest.checks.life.house import House
from manylora.loadtest.checks.life.operations import Operation, draw
from manylora.loadtest.checks.life.requests import Asking
from manylora.loadtest.checks.life.truth import Refused, Truth, must
from manylora.server.errors import ServerError

CHECK_EVERY = 25
MOST_PLACES = 25
"""Places that a change passes, at most: statements, files, calls."""
WAIT_SECONDS = 120.0


@dataclass(slots=True)
class Walk:
    """One walk. Raises Diverged at the first thing that is not so."""

    house: House
    rng: random.Random
    truth: Truth
    ids: dict[int, tuple[str, int, str]] = field(default_factory=dict)
    """Name, version and source of every id that there ever was."""
    counts: Counter[str] = field(default_factory=Counter)
    spotless: bool = True
    """Whether no fault has been met since the start: then nothing may be left over on the disk."""
    asking: Asking = field(init=False)

    def __post_init__(self) -> None:
        self.asking = Asking(self.house, self.rng, self.counts, self.ids)

    async def go(self, operations: int) -> None:
        """Do so many operations, then let all end, and delete everything."""
        kinds: dict[Callable[[], Awaitable[None]], float] = {
            self.change: 50,
            self.meet_a_fault: 20,
            self.leave: 12,
            self.be_killed: 2,
            self.start_again: 1,
        }
        for number in range(operations):
            [kind] = self.rng.choices(list(kinds), list(kinds.values()))
            self.counts[kind.__name__] += 1
            await kind()
            self.hold_names()
            for _ in range(self.rng.choice((0, 1, 2))):
                await self.asking.ask(self.truth)
            if number % CHECK_EVERY == CHECK_EVERY - 1:
                await self.rest()
        await self.rest()
        await self.end()

    # What is done

    async def change(self) -> None:
        """Make a change that nothing disturbs."""
        operation = draw(self.rng, self.truth, self.house.rig.sources)
        wanted, refused = self._wanted(operation)
        error = await self._outcome(operation.done_in(self.house.catalog))
        status = None if error is None else status_of(error)
        must(status == (None if refused is None else refused.status), f"{operation}: {error!r}, {refused!r}")
        self.counts["refused" if refused else operation.kind] += 1
        self.truth = wanted

    async def meet_a_fault(self) -> None:
        """Make a change in which one place breaks: all of it has happened, or nothing."""
        operation = draw(self.rng, self.truth, self.house.rig.sources)
        wanted, refused = self._wanted(operation)
        self.house.chaos.arm(self.rng.randrange(MOST_PLACES))
        error = await self._outcome(operation.done_in(self.house.catalog))
        await self.house.catalog.settled()
        broke = self.house.chaos.disarm()
        self.spotless &= not broke
        self.counts["faults met"] += broke
        if error is None:
            must(refused is None, f"{operation} was done, but {refused!r} was due")
            self.truth = wanted
        else:
            told = refused is not None and status_of(error) == refused.status
            must(told or broke, f"{operation}: {error!r}, {refused!r}")

    async def leave(self) -> None:
        """Make a change whose caller leaves at some moment."""
        operation = draw(self.rng, self.truth, self.house.rig.sources)
        wanted, _ = self._wanted(operation)
        task = asyncio.ensure_future(operation.done_in(self.house.catalog))
        for _ in range(self.rng.randrange(40)):
            await asyncio.sleep(0)
            if self.rng.random() < 0.3:
                await asyncio.to_thread(int)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.house.catalog.settled()
        self._take_whichever(wanted, str(operation))

    async def be_killed(self) -> None:
        """Make a change in whose middle everything is gone, and go on from what is on the disk."""
        operation = draw(self.rng, self.truth, self.house.rig.sources)
        wanted, _ = self._wanted(operation)
        await self.asking.rest()
        self.house.chaos.arm(self.rng.randrange(MOST_PLACES), for_good=True)
        error = await self._outcome(operation.done_in(self.house.catalog))
        with contextlib.suppress(AdapterError, OSError):
            await self.house.close()
        self.house.chaos.disarm()
        await self.house.open()
        self._take_whichever(wanted, f"killed in {operation}: {error!r}", acknowledged=error is None)
        self._hold_disk()

    async def start_again(self) -> None:
        """Close, and open again."""
        await self.asking.rest()
        await self.house.close()
        await self.house.open()
        self._hold_disk()

    def _wanted(self, operation: Operation) -> tuple[Truth, Refused | None]:
        """Return what must be so after an operation, and how it must be refused if it must."""
        try:
            return operation.done_to(self.truth), None
        except Refused as refused:
            return self.truth, refused

    async def _outcome(self, change: Awaitable[object]) -> Exception | None:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await change
        except TimeoutError:
            raise
        except (AdapterError, ServerError, OSError) as error:
            return error
        return None

    def _take_whichever(self, wanted: Truth, what: str, *, acknowledged: bool = False) -> None:
        """Take for true what there is: what was, or what was wanted and is if that was ``acknowledged``."""
        found = self._found()
        may = [wanted] if acknowledged else [self.truth, wanted]
        right = next((each for each in may if _told(each) == found), None)
        must(right is not None, f"{what}: found {found}, not {[_told(each) for each in may]}")
        self.truth = right or wanted

    # What must be so

    def _found(self) -> object:
        catalog = self.house.catalog
        names = {}
        for entry in catalog.list():
            versions = catalog.versions(entry.record.name)
            shares = {
                each.record.version: each.record.share for each in versions if each.record.share is not None
            }
            sources = {each.record.version: each.record.source for each in versions}
            names[entry.record.name] = (entry.record.version, sources, shares)
        mixtures = {
            entry.record.name: tuple((part.adapter, part.weight) for part in entry.record.parts)
            for entry in catalog.mixtures()
        }
        return names, mixtures

    def hold_names(self) -> None:
        """Hold what every name means against the model, and every id against all that there ever were."""
        must(self._found() == _told(self.truth), f"found {self._found()}, not {_told(self.truth)}")
        for name, found in self.truth.names.items():
            for entry in self.house.catalog.versions(name):
                record = entry.record
                of = (name, record.version, found.sources[record.version])
                must(self.ids.setdefault(record.id, of) == of, f"id {record.id} came back as {of}")
                must(entry.reason is None, f"{with_version(name, record.version)}: {entry.reason}")
        for mixture in self.house.catalog.mixtures():
            try:
                self.truth.meaning(self.truth.mixtures[mixture.record.name])
                sound = True
            except Refused:
                sound = False
            must((mixture.reason is None) == sound, f"{mixture.record.name}: {mixture.reason}")

    async def rest(self) -> None:
        """Let all requests end, and hold the engine, the registry and the store against the model."""
        await self.asking.rest()
        async with asyncio.timeout(WAIT_SECONDS):
            await self.house.catalog.settled()
        await self.house.engine.check_integrity()
        held = self.house.engine.snapshot()
        versions = sum(len(found.sources) for found in self.truth.names.values())
        must((held.running, held.waiting) == (0, 0), f"sequences are held: {held}")
        must(held.free_blocks == held.blocks, f"blocks are held: {held.free_blocks} of {held.blocks} free")
        must(sum(held.adapters.values()) == versions, f"the engine knows {held.adapters}, not {versions}")
        if self.spotless:
            self._hold_disk()

    def _hold_disk(self) -> None:
        """Nothing is on the disk but what is served: no file, no copy, no record of an attempt."""
        self.spotless = True
        lineages = self.house.registry.lineages()
        digests = {record.digest for lineage in lineages for record in lineage.records}
        must(self.house.store.digests() == digests, "files are left, or gone")
        must(self.house.registry.digests_in_use() == digests, "the registry knows files of nobody")
        must((self.house.pending(), self.house.staged()) == (0, 0), "an attempt is left")
        listed = sorted(lineage.active.name for lineage in lineages)
        must(listed == sorted(self.truth.names), f"the registry has {listed}")

    async def end(self) -> None:
        """Delete everything: nothing is held any more."""
        for name in list(self.truth.mixtures):
            await self.house.catalog.delete_mixture(name)
        for name in list(self.truth.names):
            await self.house.catalog.delete(name)
        self.truth = replace(self.truth, names={}, mixtures={})
        await self.rest()
        held = self.house.engine.snapshot()
        must(held.host_bytes == 0 and not any(held.adapters.values()), f"adapters are held: {held}")
        must(held.free_arena_rows == held.arena_rows, f"rows are held: {held.free_arena_rows}")


def status_of(error: Exception) -> int:
    """Return what HTTP says of an error: 500 for what isn't the caller's doing."""
    known = {
        UnknownAdapter: 404,
        AdapterNameTaken: 409,
        VersionConflict: 409,
        InvalidMixture: 400,
        InvalidAdapter: 400,
    }
    if isinstance(error, ServerError):
        return error.status
    return next((status for kind, status in known.items() if isinstance(error, kind)), 500)


def _told(truth: Truth) -> object:
    """Return the model's word on what Walk._found finds."""
    names = {
        name: (found.active, found.sources, {} if found.canary is None else {found.canary: found.share})
        for name, found in truth.names.items()
    }
    mixtures = {
        name: tuple((text, part_weight(text, weight)) for text, weight in parts)
        for name, parts in truth.mixtures.items()
    }
    return names, mixtures
