"""The catalog on a real engine, in this process, so that faults can be put into steps, copies and reads.

And what each request has to answer: the same tokens from an engine of its own, where nothing else happens.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from manylora.adapters.pairing import open_adapters
from manylora.adapters.reader import read_adapter
from manylora.adapters.sources.finding import Finding
from manylora.adapters.types import AdapterWeights, BaseModules, ModuleShape
from manylora.loadtest.checks.bars.material import TARGETS, Material
from manylora.loadtest.material.engines import EngineSizes, add_adapter, build_engine
from manylora.loadtest.material.random_model import SyntheticTokens
from manylora.server.catalog import AdapterCatalog, CatalogSettings
from manylora.server.engine.adapter_cache import HeldAdapter
from manylora.server.engine.async_engine import AsyncEngine
from manylora.server.engine.engine import Engine, EngineSettings
from manylora.server.engine.observer import SilentEngineObserver
from manylora.server.engine.request import GenerationRequest, SamplingParams
from manylora.server.engine.residency import Load
from manylora.server.engine.step_plan import SchedulerLimits
from manylora.server.kernels.choose import PLAIN, choose_backend
from manylora.server.kernels.cpu.arena import CpuArena
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.plain.arena import PlainArena
from manylora.server.kernels.step import AdapterRanges, RankRange
from manylora.server.model.decoder import Decoder
from manylora.server.model.loader import load_weights
from manylora.server.model.served import ServedModel

BASE = "base"
ROWS = 128
BLOCKS, BLOCK = 64, 8
HOST_BYTES = 300_000
"""About three adapters: others are read from disk again and again."""
MAX_TOKENS = 12
RANKS = (4, 8, 12, 16, 24, 5)
CPU = torch.device("cpu")
Weighted = tuple[tuple[str, float], ...]
"""(source of an adapter, weight) pairs in the order of their ids."""


class Broken(Exception):
    """A fault that was put in."""


@dataclass(slots=True)
class Faults:
    """What is to fail next, and how often something did. Set on the event loop, taken by the engine's threads."""

    step: bool = False
    write: bool = False
    move: bool = False
    read: bool = False
    count: int = 0

    def disarm(self) -> None:
        """Let nothing fail any more."""
        self.step = self.write = self.move = self.read = False

    def take(self, kind: str) -> None:
        """Raise if a fault of the kind is due; it is over then."""
        if getattr(self, kind):
            setattr(self, kind, False)
            self.count += 1
            raise Broken(f"a fault in a {kind}")


class FaultyModel(ServedModel):
    """A model whose steps may fail, once they have written to the KV cache."""

    faults: Faults

    def collect(self, launched: Any, wake: int = -1) -> StepOutput:
        """Wait for a step; see ServedModel."""
        output = super().collect(launched, wake)
        self.faults.take("step")
        return output


class FaultyPlainArena(PlainArena):
    """An arena in which copies and moves may fail, once they are done."""

    faults: Faults

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        """Copy an adapter's factors; see RankArena."""
        yield from super().writing(ranges, weights)
        self.faults.take("write")

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        """Move a range; see RankArena."""
        yield from super().moving(module, source, target_start)
        self.faults.take("move")


class FaultyCpuArena(CpuArena):
    """The same of native kernels."""

    faults: Faults

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        """Copy an adapter's factors; see RankArena."""
        yield from super().writing(ranges, weights)
        self.faults.take("write")

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        """Move a range; see RankArena."""
        yield from super().moving(module, source, target_start)
        self.faults.take("move")


@dataclass(slots=True)
class Oracle:
    """Says what a prompt is followed by with weighted adapters, computed alone; ``weights`` by source."""

    decoder: Decoder
    weights: dict[str, AdapterWeights]
    known: dict[tuple[Weighted, tuple[int, ...]], list[int]] = field(default_factory=dict)

    def tokens(self, parts: Weighted, prompt: tuple[int, ...]) -> list[int]:
        """Return MAX_TOKENS greedy tokens."""
        if (parts, prompt) not in self.known:
            engine = build_engine(self.decoder, EngineSizes(1, len(prompt) + MAX_TOKENS, 512))
            for number, (source, _) in enumerate(parts, 1):
                add_adapter(engine, number, self.weights[source])
            adapters = tuple((number, weight) for number, (_, weight) in enumerate(parts, 1))
            engine.add_request(GenerationRequest("oracle", prompt, greedy(), adapters))
            found: list[int] = []
            while len(engine.requests):
                engine.step()
                found += [t for output in engine.requests.take_outputs() for t in output.token_ids]
            self.known[parts, prompt] = found
        return self.known[parts, prompt]


@dataclass(slots=True)
class House:
    """A catalog on a running engine. ``sources`` are adapters that may be registered."""

    sources: tuple[str, ...]
    engine: AsyncEngine
    catalog: AdapterCatalog
    faults: Faults
    oracle: Oracle


@dataclass(slots=True)
class Rig:
    """What houses are opened on, one after the other: a base, adapters that may be registered, and the faults."""

    sources: tuple[str, ...]
    root: Path
    """Where the sources are."""
    modules: BaseModules
    decoder: Decoder
    oracle: Oracle
    faults: Faults = field(default_factory=Faults)

    def engine(self) -> AsyncEngine:
        """Return an engine that isn't started."""
        return AsyncEngine(
            lambda load: _engine(self.decoder, self.faults, load),
            1 << 20,
            BLOCKS * BLOCK,
            SilentEngineObserver(),
        )

    def settings(self, **changes: Any) -> CatalogSettings:
        """Return the catalog's settings, with ``changes``."""
        return CatalogSettings(
            base_names=(BASE,),
            finding=Finding(self.root),
            modules=self.modules,
            max_rank=max(RANKS),
            dtype=torch.float32,
            arena_rows=ROWS,
            **changes,
        )


def make_rig(directory: Path, kernels: str = PLAIN) -> Rig:
    """Write a base and adapters below ``directory``, and load them."""
    material = Material.make(directory, kernels)
    backend = choose_backend(CPU, torch.float32, kernels)
    config, weights, _ = load_weights(
        material.base, backend, quantization="nf4" if material.native else "none"
    )
    # Of its own: what a step writes to belongs to a decoder, and native kernels have their threads.
    alone = Decoder(config, weights, choose_backend(CPU, torch.float32, kernels))
    modules = {path: ModuleShape(out, wide) for path, (out, wide) in config.base_modules().items()}
    sources = tuple(
        material.adapter(number, rank, TARGETS[number % len(TARGETS)]) for number, rank in enumerate(RANKS)
    )
    read = {
        source: read_adapter(
            material.adapters / source, modules, max_rank=max(RANKS), dtype=torch.float32
        ).weights
        for source in sources
    }
    decoder = Decoder(config, weights, backend)
    return Rig(sources, material.adapters, modules, decoder, Oracle(alone, read))


@contextlib.asynccontextmanager
async def opened(directory: Path, kernels: str = PLAIN) -> AsyncIterator[House]:
    """Give a house whose engine runs; close it with the block."""
    rig = make_rig(directory, kernels)
    home = directory / "home"
    home.mkdir(parents=True)
    registry, store = open_adapters(home, reserved=(BASE,))
    engine = rig.engine()
    engine.start()
    catalog = AdapterCatalog(engine, registry, store, rig.settings(keep_versions=0))
    try:
        yield House(rig.sources, engine, catalog, rig.faults, rig.oracle)
    finally:
        await catalog.close()
        await engine.stop()


def greedy() -> SamplingParams:
    """Return how every request is sampled."""
    return SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


def _engine(decoder: Decoder, faults: Faults, load: Load) -> Engine:
    config, backend = decoder.config, decoder.backend
    arena = (
        FaultyCpuArena(config.shape, ROWS)
        if isinstance(backend, CpuBackend)
        else FaultyPlainArena(config.shape, ROWS, backend.dtype, CPU)
    )
    model = FaultyModel(decoder, decoder.new_kv(BLOCKS, BLOCK), arena)
    arena.faults = model.faults = faults
    settings = EngineSettings(
        vocab_size=config.vocab_size,
        num_blocks=BLOCKS,
        block_size=BLOCK,
        arena_rows=ROWS,
        host_bytes=HOST_BYTES,
        row_bytes=backend.row_bytes(config.shape),
        limits=SchedulerLimits(max_running=8, max_step_tokens=24),
    )

    def load_or_fail(held: HeldAdapter) -> None:
        def read() -> AdapterWeights:
            faults.take("read")
            return held.load_from()

        load(replace(held, load_from=read))

    tokens = SyntheticTokens(config.vocab_size)
    return Engine(model, arena, tokens, frozenset(), settings, CPU, load_or_fail)
