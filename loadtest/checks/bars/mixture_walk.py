"""A random walk over adapters, mixtures, requests, hang-ups and faults, held against a model of what must be true.

Changes are made one after the other while requests run; each request is held against its own mixture computed alone.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from manylora.adapters.errors import AdapterNameTaken, InvalidMixture, UnknownAdapter
from manylora.adapters.mixtures import MixturePart, parse_mixture, part_weight, spell
from manylora.loadtest.checks.bars.walk_house import BASE, MAX_TOKENS, House, Weighted, greedy
from manylora.server.engine.request import FinishReason, GenerationRequest
from manylora.server.errors import AdapterUnavailable, InvalidRequest, ModelNotFound, StepFailed

ADAPTERS = ("a", "b", "b:2", "team/c", "d")
MIXTURES = ("m", "n", "a:0.7")
"""The last one's name reads like a mixture's text, and so does an adapter's: a name goes first."""
WEIGHTS = (1.0, 0.7, 0.3, -0.4, 1.6, 0.0)
PROMPTS = 6
AT_ONCE = 12
"""Requests under way, at most."""
CHECK_EVERY = 100
WAIT_SECONDS = 120.0
Parts = tuple[MixturePart, ...]


class Diverged(AssertionError):
    """What happened is not what the model says."""


@dataclass(slots=True)
class Truth:
    """What must be so: names to sources and to parts, ids to sources."""

    adapters: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name to (id, source)."""
    mixtures: dict[str, Parts] = field(default_factory=dict)
    sources: dict[int, str] = field(default_factory=dict)
    """Of every id that there ever was."""

    def mixed(self, parts: Parts) -> tuple[tuple[int, float], ...] | None:
        """Return the engine's form of a mixture; None if a part isn't there."""
        if any(part.adapter not in self.adapters for part in parts):
            return None
        found = sorted((self.adapters[part.adapter][0], part.weight) for part in parts)
        return tuple((adapter_id, weight) for adapter_id, weight in found if weight)


@dataclass(slots=True)
class Walk:
    """One walk. Raises Diverged at the first thing that is not so."""

    house: House
    rng: random.Random
    truth: Truth = field(default_factory=Truth)
    running: set[asyncio.Task[None]] = field(default_factory=set)
    ended: list[asyncio.Task[None]] = field(default_factory=list)
    faulty: bool = False
    """Whether faults are put in now: by turns, so that nothing may fail half of the time."""
    deleted: set[int] = field(default_factory=set)
    """Adapters that were deleted with abort."""
    counts: Counter[str] = field(default_factory=Counter)
    asked: int = 0

    async def go(self, operations: int) -> None:
        """Do so many operations, then let all end, and delete everything."""
        kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.request: 60,
            self.put_adapter: 12,
            self.delete_adapter: 6,
            self.put_mixture: 10,
            self.delete_mixture: 4,
            self.fault: 8,
        }
        for number in range(operations):
            [kind] = self.rng.choices(list(kinds), list(kinds.values()))
            await kind()
            if number % CHECK_EVERY == CHECK_EVERY - 1:
                await self.rest()
                self.faulty = not self.faulty
        await self.rest()
        for name in list(self.truth.mixtures):
            await self.house.catalog.delete_mixture(name)
        for name in list(self.truth.adapters):
            await self.house.catalog.delete(name)
        self.truth.adapters.clear()
        self.truth.mixtures.clear()
        await self.rest()
        held = self.house.engine.snapshot()
        _must(held.host_bytes == 0 and not any(held.adapters.values()), f"adapters are held: {held}")
        _must(held.free_arena_rows == held.arena_rows, f"rows are held: {held.free_arena_rows}")

    async def rest(self) -> None:
        """Let all requests end, and hold the catalog, the engine and its books against the truth."""
        if self.running:
            _, late = await asyncio.wait(self.running, timeout=WAIT_SECONDS)
            _must(not late, f"{len(late)} requests never ended")
        for task in self.ended:
            task.result()
        self.ended.clear()
        self.house.faults.disarm()
        async with asyncio.timeout(WAIT_SECONDS):
            await self.house.catalog.settled()
        await self.house.engine.check_integrity()
        held = self.house.engine.snapshot()
        _must((held.running, held.waiting) == (0, 0), f"sequences are held: {held}")
        _must(held.free_blocks == held.blocks, f"blocks are held: {held.free_blocks} of {held.blocks} free")
        known = {entry.record.name: entry.record.id for entry in self.house.catalog.list()}
        _must(
            known == {name: found for name, (found, _) in self.truth.adapters.items()}, f"adapters: {known}"
        )
        mixed = {entry.record.name: tuple(entry.record.parts) for entry in self.house.catalog.mixtures()}
        _must(mixed == self.truth.mixtures, f"mixtures: {mixed}")
        for entry in self.house.catalog.mixtures():
            there = self.truth.mixed(tuple(entry.record.parts)) is not None
            _must((entry.reason is None) == there, f"{entry.record.name}: {entry.reason}")
        _must(sum(held.adapters.values()) == len(known), f"the engine holds {held.adapters}")

    # Adapters and mixtures

    async def put_adapter(self) -> None:
        """Register or replace an adapter; other weights under a taken name are refused, and mixtures' names."""
        name, source = self.rng.choice((*ADAPTERS, *MIXTURES)), self.rng.choice(self.house.sources)
        catalog = self.house.catalog
        before = self.truth.adapters.get(name)
        replace = self.rng.random() < 0.5
        right: type[AdapterNameTaken | UnknownAdapter] | None
        # One name at most is pinned, so that there is always room.
        pin = name == ADAPTERS[0] and self.rng.random() < 0.3
        if replace:
            right = None if before else UnknownAdapter
        else:
            right = AdapterNameTaken if before and before[1] != source else None
        if name in self.truth.mixtures:
            right = AdapterNameTaken
        try:
            if replace:
                record = await catalog.replace(name, source, pin=pin)
            else:
                record, _ = await catalog.register(name, source, pin=pin)
        except (AdapterNameTaken, UnknownAdapter) as error:
            _must(right is not None, f"{name}: {error}")
            self.counts["refused"] += 1
            return
        _must(right is None, f"{name} was put, but {right} was due")
        _must(
            (record.id in self.truth.sources) == (before is not None and before[1] == source),
            "an id came back",
        )
        self.truth.adapters[name] = (record.id, source)
        self.truth.sources[record.id] = source
        self.counts["replaced" if before else "registered"] += 1

    async def delete_adapter(self) -> None:
        """Delete an adapter, waiting for its requests or ending them."""
        name, abort = self.rng.choice((*ADAPTERS, *MIXTURES)), self.rng.random() < 0.3
        before = self.truth.adapters.pop(name, None)
        if before and abort:
            self.deleted.add(before[0])
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self.house.catalog.delete(name, abort=abort)
            _must(before is not None, f"{name} was deleted and wasn't there")
        except UnknownAdapter:
            _must(before is None, f"{name} could not be deleted")
        self.counts["deleted"] += before is not None

    async def put_mixture(self) -> None:
        """Make a mixture, or give it other parts."""
        name, parts, catalog = self.rng.choice(MIXTURES), self.parts(), self.house.catalog
        taken, there = name in self.truth.adapters, self.truth.mixed(parts) is not None
        try:
            await catalog.put_mixture(name, parts)
        except (AdapterNameTaken, ModelNotFound, UnknownAdapter) as error:
            _must(taken or not there, f"{name} = {spell(parts)}: {error}")
            self.counts["refused"] += 1
            return
        _must(there and not taken, f"{name} = {spell(parts)} was made")
        before = self.truth.mixtures.get(name, ())
        if sorted(before, key=str) != sorted(parts, key=str):
            self.truth.mixtures[name] = parts
        else:
            entry = catalog.get_mixture(name)
            _must(entry is not None and sorted(entry.record.parts, key=str) == sorted(parts, key=str), name)
            self.truth.mixtures[name] = tuple(entry.record.parts) if entry else parts
        self.counts["mixtures made"] += 1

    async def delete_mixture(self) -> None:
        """Delete a mixture."""
        name = self.rng.choice(MIXTURES)
        before = self.truth.mixtures.pop(name, None)
        try:
            await self.house.catalog.delete_mixture(name)
            _must(before is not None, f"{name} was deleted and wasn't there")
        except UnknownAdapter:
            _must(before is None, f"{name} could not be deleted")
        self.counts["mixtures deleted"] += before is not None

    def parts(self) -> Parts:
        """Return random parts, mostly of adapters that are there."""
        names = self.rng.sample(ADAPTERS, self.rng.randint(1, 4))
        if self.truth.adapters and self.rng.random() < 0.8:
            names = self.rng.sample(sorted(self.truth.adapters), min(len(names), len(self.truth.adapters)))
        return tuple(MixturePart(name, part_weight(name, self.rng.choice(WEIGHTS))) for name in names)

    async def fault(self) -> None:
        """Let the next step, copy or read fail."""
        if self.faulty:
            setattr(self.house.faults, self.rng.choice(("step", "write", "move", "read")), True)

    # Requests

    async def request(self) -> None:
        """Ask for the base, an adapter, or a mixture by its name or its text; go on while it answers."""
        while len(self.running) >= AT_ONCE:
            await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED)
        model, right = self._choose()
        try:
            found = self.house.catalog.resolve(model)
        except (ModelNotFound, AdapterUnavailable, InvalidRequest, InvalidMixture) as error:
            _must(right is None, f"{model}: {error}")
            self.counts["not there"] += 1
            return
        _must(found.adapters == right, f"{model} means {found.adapters}, not {right}")
        self.asked += 1
        prompt = tuple(random.Random(self.rng.randrange(PROMPTS)).choices(range(300), k=17))
        request = GenerationRequest(
            str(self.asked), prompt, greedy(), found.adapters, found.label, self.rng.choice((1, 1, 2))
        )
        task = asyncio.create_task(self._read(request, self.rng.choice((None, None, None, 0, 3))))
        self.running.add(task)
        task.add_done_callback(self._ended)
        await asyncio.sleep(self.rng.choice((0, 0, 0.002)))

    def _choose(self) -> tuple[str, tuple[tuple[int, float], ...] | None]:
        """Return what to ask for, and what the engine must get; None: it isn't there."""
        kind = self.rng.randrange(6)
        if kind == 0:
            return BASE, ()
        names = spell(self.parts()), self.rng.choice(ADAPTERS), self.rng.choice(MIXTURES)
        text = names[(0, 0, 0, 1, 2, 2)[kind]]
        return text, self._meant(text)

    def _meant(self, text: str) -> tuple[tuple[int, float], ...] | None:
        """A text that is a name is that name; else it is the mixture that it spells, of different adapters alone."""
        if text in self.truth.adapters:
            return ((self.truth.adapters[text][0], 1.0),)
        if text in self.truth.mixtures:
            return self.truth.mixed(self.truth.mixtures[text])
        parts = parse_mixture(text, lambda name: name in self.truth.adapters or name in self.truth.mixtures)
        twice = len({part.adapter for part in parts}) < len(parts)
        return None if twice else self.truth.mixed(parts)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        self.ended.append(task)

    async def _read(self, request: GenerationRequest, leave_after: int | None) -> None:
        parts: Weighted = tuple((self.truth.sources[i], weight) for i, weight in request.adapters)
        right = self.house.oracle.tokens(parts, request.prompt_token_ids)
        may_fail = self.faulty
        stream = self.house.engine.submit(request)
        if leave_after == 0:
            stream.abort()
        tokens: dict[int, list[int]] = {index: [] for index in range(request.n)}
        async for outputs in stream:
            for output in outputs:
                tokens[output.index] += output.token_ids
                got = tokens[output.index]
                _must(got == right[: len(got)], f"{parts} answers {got}, not {right}")
                match output.finish_reason:
                    case FinishReason.LENGTH:
                        _must(len(got) == MAX_TOKENS, f"an answer of {len(got)} tokens")
                        self.counts["whole answers"] += 1
                    case FinishReason.ABORTED:
                        ended = any(adapter_id in self.deleted for adapter_id, _ in request.adapters)
                        _must(leave_after is not None or ended, "a request was aborted by nobody")
                        self.counts["left"] += 1
                    case FinishReason.FAILED:
                        told = isinstance(output.error, StepFailed | AdapterUnavailable)
                        _must(told and may_fail, f"failed: {output.error!r}")
                        self.counts["failed"] += 1
            if leave_after is not None and len(tokens[0]) >= leave_after:
                stream.abort()


def _must(so: bool, otherwise: str) -> None:
    if not so:
        raise Diverged(otherwise)
