"""A fake engine that keeps the contract of AdapterEngine, and a catalog on top of it."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from manylora.adapters.names import with_version
from manylora.adapters.records import AdapterRecord, AdapterState
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.reserve import Reserve
from manylora.adapters.sources.finding import Finding
from manylora.adapters.store import AdapterStore
from manylora.adapters.types import AdapterWeights
from manylora.server.catalog import AdapterCatalog, CatalogSettings, FreedAdapter, Tier
from manylora.server.errors import AdapterUnavailable
from tests.adapters.making import MODULES, VOCABULARY, factors, write

SECONDS = 20.0
"""How long a test waits for what happens within milliseconds, unless it never does."""


class Gate:
    """Opens and closes; whoever passes waits while it is closed."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._reached = asyncio.Event()

    def close(self) -> None:
        self._open.clear()
        self._reached.clear()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        """Return when someone waits at the closed gate."""
        async with asyncio.timeout(SECONDS):
            await self._reached.wait()

    async def __call__(self) -> None:
        if not self._open.is_set():
            self._reached.set()
        await self._open.wait()


@dataclass
class Held:
    """What the engine knows of one adapter."""

    weights: AdapterWeights | None
    load_from: Callable[[], AdapterWeights]
    pinned: bool
    device: bool
    invocation: tuple[int, ...] = ()


class FakeEngine:
    """Holds weights, knows running sequences, has ``room`` in its arena, and can be held up at gates."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.held: dict[int, Held] = {}
        self.ever: set[int] = set()
        self.running: Counter[int] = Counter()
        self.resting: set[int] = set()
        self.idle: dict[int, asyncio.Event] = {}
        self.adding, self.removing = Gate(), Gate()
        self.added, self.added_cold = 0, 0
        self.fault: Exception | None = None

    async def add_adapter(
        self,
        adapter_id: int,
        weights: AdapterWeights,
        *,
        load_from: Callable[[], AdapterWeights],
        preload: bool,
        pinned: bool,
    ) -> None:
        await self.adding()
        if self.fault is not None:
            raise self.fault
        if preload and self._on_device() >= self.room:
            raise AdapterUnavailable("no room in the arena")
        self._know(adapter_id, Held(weights, load_from, pinned, preload, weights.invocation))
        self.added += 1

    async def add_adapter_cold(
        self,
        adapter_id: int,
        rank_by_module: Mapping[str, int],
        *,
        load_from: Callable[[], AdapterWeights],
        pinned: bool,
        invocation: tuple[int, ...] = (),
    ) -> None:
        assert all(rank > 0 for rank in rank_by_module.values())
        self._know(adapter_id, Held(None, load_from, pinned, False, invocation))
        self.added_cold += 1

    async def keep_adapter(
        self, adapter_id: int, weights: AdapterWeights | None, *, preload: bool, pinned: bool
    ) -> None:
        if self.fault is not None:
            raise self.fault
        held = self.held[adapter_id]
        self.resting.discard(adapter_id)
        if preload and not held.device:
            held.weights = held.weights or weights
            assert held.weights is not None
            if self._on_device() >= self.room:
                raise AdapterUnavailable("no room in the arena")
            held.device = True
        held.pinned = pinned

    async def remove_adapter(self, adapter_id: int, *, abort: bool) -> FreedAdapter:
        held = self.held[adapter_id]
        self.resting.discard(adapter_id)
        aborted = self.running[adapter_id] if abort else 0
        if abort:
            self.finish(adapter_id)
        await self.removing()
        while self.running[adapter_id]:
            await self.idle.setdefault(adapter_id, asyncio.Event()).wait()
        del self.held[adapter_id]
        size = held.weights.nbytes if held.weights else 0
        return FreedAdapter(8 if held.device else 0, size if held.device else 0, size, aborted)

    async def rest_adapter(self, adapter_id: int) -> None:
        if self.fault is not None:
            raise self.fault
        held = self.held[adapter_id]
        held.pinned = False
        self.resting.add(adapter_id)
        self._let_rest()

    def _let_rest(self) -> None:
        for adapter_id in [each for each in self.resting if not self.running[each]]:
            self.resting.discard(adapter_id)
            self.held[adapter_id].device, self.held[adapter_id].weights = False, None

    def adapter_tier(self, adapter_id: int) -> Tier:
        held = self.held[adapter_id]
        return "device" if held.device else "host" if held.weights else "disk"

    def start(self, adapter_id: int) -> None:
        """A sequence begins; the adapter must be known."""
        assert adapter_id in self.held
        self.running[adapter_id] += 1

    def finish(self, adapter_id: int) -> None:
        """All its sequences end."""
        self.running[adapter_id] = 0
        self._let_rest()
        self.idle.setdefault(adapter_id, asyncio.Event()).set()

    def let_go(self) -> None:
        """Hold nobody up any more: gates open, all sequences end."""
        self.adding.open()
        self.removing.open()
        for adapter_id in list(self.running):
            self.finish(adapter_id)

    def evict(self, adapter_id: int) -> None:
        """The host tier lets the weights go."""
        self.held[adapter_id].weights = None

    def _on_device(self) -> int:
        return sum(held.device for held in self.held.values())

    def _know(self, adapter_id: int, held: Held) -> None:
        assert adapter_id not in self.ever or adapter_id not in self.held
        self.ever.add(adapter_id)
        self.held[adapter_id] = held


@dataclass
class Diary:
    """An observer that writes down what it hears."""

    events: list[tuple[str, str]] = field(default_factory=list)
    freed: list[FreedAdapter] = field(default_factory=list)

    def loaded(self, record: AdapterRecord, seconds: float, nbytes: int) -> None:
        assert seconds >= 0
        assert nbytes > 0
        self.events.append(("loaded", record.name))

    def swapped(self, old: AdapterRecord, new: AdapterRecord, seconds: float) -> None:
        self.events.append(("swapped", f"{old.id}>{new.id}"))

    def removed(self, record: AdapterRecord, freed: FreedAdapter, seconds: float) -> None:
        self.events.append(("removed", record.name))
        self.freed.append(freed)

    def failed(self, operation: str, name: str, error: BaseException) -> None:
        self.events.append((f"failed {operation}", name))


class House:
    """A directory with adapters to register, a store, a registry, and a catalog that can be restarted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sources = root / "sources"
        self.sources.mkdir()
        self.diary = Diary()
        self.open()

    def open(
        self,
        engine: FakeEngine | None = None,
        *,
        trusted: Path | None = None,
        reserve: Reserve | None = None,
        **changes: Any,
    ) -> None:
        """Start, as a server does, with what is on disk; ``changes`` go into the catalog's settings."""
        self.engine = engine or FakeEngine()
        self.store = AdapterStore(self.root / "store")
        self.registry = AdapterRegistry(
            self.root / "adapters.db", reserved=["base"], lock_wait_ms=50, reserve=reserve
        )
        settings = CatalogSettings(
            base_names=("base",),
            finding=Finding(self.sources, frozenset(() if trusted is None else (str(trusted),))),
            modules=MODULES,
            max_rank=16,
            dtype=torch.float32,
            vocab_size=VOCABULARY,
        )
        # What is replaced goes, as most tests have it; test_versions.py keeps some.
        settings = replace(settings, **{"keep_versions": 0, **changes})
        self.catalog = AdapterCatalog(self.engine, self.registry, self.store, settings, self.diary)

    def source(self, name: str, seed: int = 0, template: str | None = None, rank: int = 4) -> str:
        """Write an adapter to register; returns its source."""
        files = {"chat_template.jinja": template} if template else {}
        write(self.sources / name, tensors=factors(seed, rank=rank), files=files, changes={"r": rank})
        return name

    def id_of(self, name: str) -> int:
        """Return the id that a request for one adapter gets."""
        [(adapter_id, weight)] = self.catalog.resolve(name).adapters
        assert weight == 1
        return adapter_id

    def kill(self) -> None:
        """End as a crash does: nothing is tidied up."""
        self.registry.close()

    async def leave(self) -> None:
        """End what a test has left under way, which may have failed anywhere; then all must agree."""
        self.engine.let_go()
        async with asyncio.timeout(SECONDS):
            await self.catalog.settled()
        self.check()
        await self.catalog.close()

    def check(self) -> None:
        """What must hold whenever nothing is under way: catalog, engine, registry and store agree."""
        lineages = self.registry.lineages()
        entries = self.catalog.list()
        assert [entry.record for entry in entries] == [each.active for each in lineages]
        versions = [each for entry in entries for each in self.catalog.versions(entry.record.name)]
        records = [record for each in lineages for record in each.newest_first()]
        assert [version.record for version in versions] == records
        assert [entry.record for entry in self.catalog.mixtures()] == self.registry.mixtures.active()
        available = {version.record.id for version in versions if version.reason is None}
        assert self.engine.held.keys() == available
        assert not self.engine.resting
        assert self.registry.digests_in_use() == {record.digest for record in records}
        assert self.store.digests() == {record.digest for record in records}
        assert list((self.root / "store" / ".staging").iterdir()) == []
        for record in records:
            if record.id in available:
                assert self.id_of(with_version(record.name, record.version)) == record.id
                if record.state is AdapterState.ACTIVE:
                    assert self.id_of(record.name) == record.id
