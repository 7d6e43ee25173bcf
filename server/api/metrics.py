"""Prometheus metrics of one server, in a registry of their own; docs/api.md lists all of them.

Histograms of what a client feels are here; what is told by adapter is in adapter_metrics.py, by route in
http_metrics.py; what is read when it is scraped is in gauges.py.
"""

import platform
from collections.abc import Callable, Collection
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest

from manylora.server.api.adapter_metrics import AdapterCounters, AdapterOperations
from manylora.server.api.gauges import Gauges, ScrapedGauges
from manylora.server.api.http_metrics import HttpCounters
from manylora.server.api.shown_metrics import OfSome
from manylora.server.api.tally import Tally

TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

STEP_PARTS = ("schedule", "place", "batch", "model", "sample", "commit")
"""As StepTimings names them."""


class RequestTimes:
    """Histograms of what clients wait for, and of the steps that they wait in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def seconds(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"manylora_{name}_seconds", meaning, buckets=buckets, registry=registry)

        self.first_token = seconds("time_to_first_token", "From arrival to the first token", REQUEST_SECONDS)
        self.between_tokens = Tally(
            "manylora_time_between_tokens_seconds", "Between tokens of a stream", TOKEN_SECONDS, registry
        )
        self.end_to_end = seconds("request", "From arrival to the last token", REQUEST_SECONDS)
        self.queue = seconds("queue", "From arrival to the first step", REQUEST_SECONDS)
        self.step = seconds("step", "One engine step", TOKEN_SECONDS)
        parts = Counter(
            "manylora_step_part_seconds",
            "What steps' parts took; model and sample are measured where they run",
            ["part"],
            registry=registry,
        )
        self.step_parts = {part: parts.labels(part) for part in STEP_PARTS}


class Metrics(AdapterOperations):
    """All metrics of one server; it is the catalog's observer too. Methods may be called from any thread."""

    def __init__(self, base_model: str, max_adapter_labels: int) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)
        self.times = RequestTimes(self.registry)
        self.http = HttpCounters(self.registry)
        self.by_adapter = AdapterCounters(self.registry, base_model, max_adapter_labels)
        self._names: Callable[[], Collection[str]] = tuple
        ProcessCollector(registry=self.registry)
        build = Info("manylora_build", "What runs here", registry=self.registry)
        build.info(
            {
                "version": version("manylora"),
                "python": platform.python_version(),
                "torch": version("torch"),
                "base_model": base_model,
            }
        )

    def scrape_with(self, read: Callable[[Gauges], None], names: Callable[[], Collection[str]]) -> None:
        """Have ``read`` fill the gauges at every scrape, and only ``names`` have labels of their own."""
        self._names = names
        self.registry.register(ScrapedGauges(read))

    def exposition(self, shown: Callable[[str], bool] | None = None) -> bytes:
        """Return the text that Prometheus reads; of adapters only what is ``shown``, None: of all."""
        # Here and not where adapters are deleted: a request may end, or a deletion go on, after its caller left.
        self.by_adapter.keep_only(self._names())
        return generate_latest(self.registry if shown is None else OfSome(self.registry, shown))
