"""The engine's observer that fills the metrics, and what the gauges read when they are scraped."""

from server.api.metrics import Gauges, Metrics, lora_requests_info
from server.catalog import AdapterCatalog
from server.engine.async_engine import AsyncEngine
from server.engine.observer import EndedRequest, StepTimings


class EngineMetrics:
    """Hears the engine's thread; prometheus-client's metrics are thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def step_finished(self, timings: StepTimings) -> None:
        """Count a step."""
        self._metrics.step.observe(timings.total)

    def token_gap(self, seconds: float) -> None:
        """Count the time between two tokens."""
        self._metrics.between_tokens.observe(seconds)

    def request_ended(self, ended: EndedRequest) -> None:
        """Count a request and its tokens."""
        metrics = self._metrics
        label = metrics.label(ended.adapter_label)
        metrics.requests.labels(label, ended.outcome).inc()
        metrics.tokens.labels(label, "prompt").inc(ended.prompt_tokens)
        metrics.tokens.labels(label, "generated").inc(ended.generated_tokens)
        metrics.end_to_end.observe(ended.seconds)
        if ended.queue_seconds is not None:
            metrics.queue.observe(ended.queue_seconds)
        if ended.first_token_seconds is not None:
            metrics.first_token.observe(ended.first_token_seconds)

    def adapter_read(self, seconds: float) -> None:
        """Count a read from disk."""
        self._metrics.load.labels("read").observe(seconds)

    def adapter_placed(self, seconds: float) -> None:
        """Count a copy into the arena."""
        self._metrics.load.labels("place").observe(seconds)

    def scrape(self, engine: AsyncEngine, catalog: AdapterCatalog) -> None:
        """Have the gauges read the engine and the catalog."""
        self._metrics.scrape_with(lambda gauges: _read(gauges, engine, catalog))


def _read(gauges: Gauges, engine: AsyncEngine, catalog: AdapterCatalog) -> None:
    stats = engine.snapshot()
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
    for tier, count in stats.adapters.items():
        gauges.set("manylora_adapters", "Adapters by where their weights are", count, tier=tier)
    gauges.set("manylora_preemptions_total", "Sequences that went back to the queue", stats.preemptions)
    gauges.set(
        "manylora_prefix_cache_queried_tokens_total", "Prompt tokens looked up", stats.prefix_queried_tokens
    )
    gauges.set("manylora_prefix_cache_hit_tokens_total", "Prompt tokens found", stats.prefix_hit_tokens)
    names = {entry.record.id: entry.record.name for entry in catalog.list()}
    resident = [names[each] for each in stats.resident if each in names]
    waited = [names[each] for each in stats.waited_for if each in names and each not in stats.resident]
    lora_requests_info(gauges, len(names), resident, waited)
