"""What the engine holds, for metrics and whoever watches."""

from collections.abc import Mapping
from dataclasses import dataclass

from manylora.adapters.types import Tier
from manylora.adapters.vocabulary import UNIT, VOCABULARY
from manylora.server.engine.engine import Engine

TIERS: tuple[Tier, ...] = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds now. Read from another thread, so only nearly consistent."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    cached_blocks: int
    arena_rows: Mapping[str, int]
    free_arena_rows: Mapping[str, int]
    adapters: Mapping[Tier, int]
    host_bytes: int
    """Of adapters' copies on the host."""
    vocabulary_bytes: int
    """For adapters' own embeddings and heads on the device."""
    free_vocabulary_bytes: int
    resident: tuple[int, ...]
    """Ids of the adapters on the device."""
    waited_for: tuple[int, ...]
    preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int


def stats_of(engine: Engine) -> EngineStats:
    """Return what an engine holds now. Callable from any thread."""
    cache = engine.cache
    tiers = cache.tiers()
    rows = {module: rows for module, rows in cache.allocator.rows.items() if module != VOCABULARY}
    units = cache.allocator.rows.get(VOCABULARY, 0)
    return EngineStats(
        running=len(engine.scheduler.running),
        waiting=len(engine.scheduler.waiting) + engine.requests.num_unmade,
        blocks=engine.settings.num_blocks,
        free_blocks=engine.blocks.num_free,
        cached_blocks=engine.blocks.num_cached,
        arena_rows=rows,
        free_arena_rows={module: cache.allocator.free_rows(module) for module in rows},
        adapters={tier: list(tiers.values()).count(tier) for tier in TIERS},
        host_bytes=cache.host_bytes,
        vocabulary_bytes=units * UNIT,
        free_vocabulary_bytes=cache.allocator.free_rows(VOCABULARY) * UNIT if units else 0,
        resident=tuple(adapter_id for adapter_id, tier in tiers.items() if tier == "device"),
        waited_for=tuple(engine.scheduler.wanted),
        preemptions=engine.preemptions,
        prefix_queried_tokens=engine.blocks.queried_tokens,
        prefix_hit_tokens=engine.blocks.hit_tokens,
    )
