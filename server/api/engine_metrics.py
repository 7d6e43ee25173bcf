"""The engine's observer that fills the metrics, and what the gauges read when they are scraped."""

from collections.abc import Sequence

from manylora.server.api.gauges import Gauges, lora_requests_info, server_load
from manylora.server.api.metrics import Metrics
from manylora.server.catalog import AdapterCatalog, CatalogEntry
from manylora.server.engine.async_engine import AsyncEngine
from manylora.server.engine.observer import EndedRequest, StepTimings
from manylora.server.engine.stats import EngineStats

USUAL_RANK = 16


class EngineMetrics:
    """Hears the engine's thread; prometheus-client's metrics are thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def step_finished(self, timings: StepTimings) -> None:
        """Count a step."""
        times = self._metrics.times
        times.step.observe(timings.total)
        for part, seconds in times.step_parts.items():
            seconds.inc(getattr(timings, part))

    def token_gaps(self, seconds: Sequence[float]) -> None:
        """Count the times between tokens."""
        self._metrics.times.between_tokens.observe_all(seconds)

    def request_ended(self, ended: EndedRequest) -> None:
        """Count a request and its tokens."""
        times = self._metrics.times
        self._metrics.by_adapter.count(ended)
        times.end_to_end.observe(ended.seconds)
        if ended.queue_seconds is not None:
            times.queue.observe(ended.queue_seconds)
        if ended.first_token_seconds is not None:
            times.first_token.observe(ended.first_token_seconds)

    def adapter_read(self, seconds: float) -> None:
        """Count a read from disk."""
        self._metrics.load.labels("read").observe(seconds)

    def adapter_placed(self, seconds: float) -> None:
        """Count a copy into the arena."""
        self._metrics.load.labels("place").observe(seconds)

    def scrape(
        self, engine: AsyncEngine, catalog: AdapterCatalog, base_model: str, block_size: int, kv_dtype: str
    ) -> None:
        """Have the gauges read the engine and the catalog."""

        def read(gauges: Gauges) -> None:
            stats = engine.snapshot()
            _read(gauges, stats, catalog.list())
            server_load(
                gauges,
                base_model,
                running=stats.running,
                waiting=stats.waiting,
                blocks=stats.blocks,
                free_blocks=stats.free_blocks,
                block_size=block_size,
                kv_dtype=kv_dtype,
            )

        def names() -> set[str]:
            adapters = {entry.record.name for entry in catalog.list()}
            return adapters | {entry.record.name for entry in catalog.mixtures()}

        self._metrics.scrape_with(read, names)


def _read(gauges: Gauges, stats: EngineStats, entries: Sequence[CatalogEntry]) -> None:
    gauges.set("manylora_requests_running", "Sequences that decode", stats.running)
    gauges.set("manylora_requests_waiting", "Sequences that wait", stats.waiting)
    for state, blocks in (
        ("free", stats.free_blocks),
        ("used", stats.blocks - stats.free_blocks),
        ("cached", stats.cached_blocks),
    ):
        gauges.set("manylora_kv_blocks", "KV blocks; cached ones may be free as well", blocks, state=state)
    for module, rows in stats.arena_rows.items():
        free = stats.free_arena_rows[module]
        gauges.set("manylora_arena_rows", "Rank rows of the arena", free, module=module, state="free")
        gauges.set("manylora_arena_rows", "Rank rows of the arena", rows - free, module=module, state="used")
    for state, nbytes in (
        ("free", stats.free_vocabulary_bytes),
        ("used", stats.vocabulary_bytes - stats.free_vocabulary_bytes),
    ):
        what = "Memory on the device for adapters' own embeddings and heads"
        gauges.set("manylora_vocabulary_bytes", what, nbytes, state=state)
    for tier, count in stats.adapters.items():
        gauges.set("manylora_adapters", "Adapters by where their weights are", count, tier=tier)
    gauges.set("manylora_adapter_host_bytes", "Memory of adapters' copies on the host", stats.host_bytes)
    gauges.total("manylora_preemptions", "Sequences that went back to the queue", stats.preemptions)
    gauges.total(
        "manylora_prefix_cache_queried_tokens", "Prompt tokens looked up", stats.prefix_queried_tokens
    )
    gauges.total("manylora_prefix_cache_hit_tokens", "Prompt tokens found", stats.prefix_hit_tokens)
    names = {entry.record.id: entry.record.name for entry in entries}
    resident = [names[each] for each in stats.resident if each in names]
    waited = [names[each] for each in stats.waited_for if each in names and each not in stats.resident]
    lora_requests_info(gauges, max(len(resident), _adapters_that_fit(stats, entries)), resident, waited)


def _adapters_that_fit(stats: EngineStats, entries: Sequence[CatalogEntry]) -> int:
    """Estimate how many adapters the arena holds at once: rows are given by rank, so it depends on which."""
    ranks = [entry.record.rank for entry in entries] or [USUAL_RANK]
    return int(min(stats.arena_rows.values(), default=0) * len(ranks) // sum(ranks))
