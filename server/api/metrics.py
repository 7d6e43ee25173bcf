"""Prometheus metrics: histograms of what a client feels, counters by adapter, gauges read when scraped.

Label values are bounded: only so many adapters have labels of their own, the rest are "other", and a deleted
adapter's series go with it. docs/metrics.md lists all of them.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.records import AdapterRecord
from adapters.types import FreedAdapter

OTHER = "other"
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Gauges:
    """What the server holds now: a name with its value per label set."""

    def __init__(self) -> None:
        self._families: dict[str, GaugeMetricFamily] = {}

    def set(self, name: str, help_text: str, value: float, **labels: str) -> None:
        """Add a sample to the family ``name``."""
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = GaugeMetricFamily(name, help_text, labels=list(labels))
        family.add_metric(list(labels.values()), value)

    def families(self) -> Iterable[Metric]:
        """Return all families."""
        return self._families.values()


class _ScrapedGauges(Collector):
    def __init__(self, read: Callable[[Gauges], None]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        gauges = Gauges()
        self._read(gauges)
        yield from gauges.families()


class Metrics:
    """All metrics of one server, in a registry of their own. Methods may be called from any thread."""

    def __init__(self, base_model: str, max_adapter_labels: int) -> None:
        self.registry = CollectorRegistry()
        self._base = base_model
        self._max_labels = max_adapter_labels
        self._labels: set[str] = set()
        self._lock = threading.Lock()
        own = self.registry
        self.first_token = Histogram(
            "manylora_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=REQUEST_SECONDS,
            registry=own,
        )
        self.between_tokens = Histogram(
            "manylora_time_between_tokens_seconds",
            "Between tokens of a stream",
            buckets=TOKEN_SECONDS,
            registry=own,
        )
        self.end_to_end = Histogram(
            "manylora_request_seconds",
            "From arrival to the last token",
            buckets=REQUEST_SECONDS,
            registry=own,
        )
        self.queue = Histogram(
            "manylora_queue_seconds", "From arrival to the first step", buckets=REQUEST_SECONDS, registry=own
        )
        self.step = Histogram("manylora_step_seconds", "One engine step", buckets=TOKEN_SECONDS, registry=own)
        self.load = Histogram(
            "manylora_adapter_load_seconds",
            "Making an adapter ready, by what was done: register, read (from disk), place (into the arena), swap",
            ["operation"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
            registry=own,
        )
        self.tokens = Counter(
            "manylora_tokens", "Tokens by adapter and kind", ["adapter", "kind"], registry=own
        )
        self.requests = Counter(
            "manylora_requests", "Ended requests by adapter and outcome", ["adapter", "outcome"], registry=own
        )
        self.failures = Counter(
            "manylora_background_failures", "Failures that no caller hears of", ["operation"], registry=own
        )

    def scrape_with(self, read: Callable[[Gauges], None]) -> None:
        """Have ``read`` fill the gauges at every scrape."""
        self.registry.register(_ScrapedGauges(read))

    def exposition(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry)

    def label(self, adapter: str) -> str:
        """Return the label of an adapter: its name while there is room, "other" beyond."""
        name = adapter or self._base
        with self._lock:
            if name in self._labels or name == self._base:
                return name
            if len(self._labels) >= self._max_labels:
                return OTHER
            self._labels.add(name)
            return name

    def forget_adapter(self, name: str) -> None:
        """Drop a deleted adapter's series, so that its place is free."""
        with self._lock:
            if name not in self._labels:
                return
            self._labels.discard(name)
        for kind in ("prompt", "generated"):
            self._drop(self.tokens, name, kind)
        for outcome in ("finished", "aborted", "failed"):
            self._drop(self.requests, name, outcome)

    @staticmethod
    def _drop(counter: Counter, *labels: str) -> None:
        try:
            counter.remove(*labels)
        except KeyError:
            return  # never counted

    # What the catalog reports

    def loaded(self, record: AdapterRecord, seconds: float, nbytes: int) -> None:
        """A new adapter serves."""
        self.load.labels("register").observe(seconds)

    def swapped(self, old: AdapterRecord, new: AdapterRecord, seconds: float) -> None:
        """A new version took over."""
        self.load.labels("swap").observe(seconds)

    def removed(self, record: AdapterRecord, freed: FreedAdapter, seconds: float) -> None:
        """An adapter's memory is given back."""
        self.load.labels("remove").observe(seconds)

    def failed(self, operation: str, name: str, error: BaseException) -> None:
        """Something failed in the background."""
        self.failures.labels(operation).inc()


def lora_requests_info(gauges: Gauges, max_lora: int, running: Iterable[str], waiting: Iterable[str]) -> None:
    """Set vLLM's gauge, by which cluster routers find a server that has an adapter at hand.

    Value: unix time of this reading. Labels: how many fit, the resident adapters, those that are waited for.
    """
    gauges.set(
        "vllm:lora_requests_info",
        "Adapters at hand and waited for",
        time.time(),
        max_lora=str(max_lora),
        running_lora_adapters=",".join(sorted(running)),
        waiting_lora_adapters=",".join(sorted(waiting)),
    )
