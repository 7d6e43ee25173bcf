"""Metrics about adapters: tokens and requests by adapter, and how long loading and swapping take.

Label values are bounded: only so many adapters have labels of their own, the rest are "other", and a deleted
adapter's series go with it.
"""

import threading

from prometheus_client import CollectorRegistry, Counter, Histogram

from manylora.adapters.records import AdapterRecord
from manylora.adapters.types import FreedAdapter

OTHER = "other"
LOAD_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
KINDS = ("prompt", "generated")
OUTCOMES = ("finished", "aborted", "failed")


class AdapterCounters:
    """Tokens and requests by adapter. Methods may be called from any thread."""

    def __init__(self, registry: CollectorRegistry, base_model: str, max_labels: int) -> None:
        self._base = base_model
        self._max_labels = max_labels
        self._labels: set[str] = set()
        self._lock = threading.Lock()
        self._tokens = Counter(
            "manylora_tokens", "Tokens by adapter and kind", ["adapter", "kind"], registry=registry
        )
        self._requests = Counter(
            "manylora_requests",
            "Ended requests by adapter and outcome",
            ["adapter", "outcome"],
            registry=registry,
        )

    def count(self, adapter: str, outcome: str, prompt: int, generated: int) -> None:
        """Count an ended request and its tokens; ``adapter`` is "" for the base."""
        with self._lock:
            label = self._label(adapter or self._base)
            self._requests.labels(label, outcome).inc()
            self._tokens.labels(label, "prompt").inc(prompt)
            self._tokens.labels(label, "generated").inc(generated)

    def forget(self, adapter: str) -> None:
        """Drop a deleted adapter's series, so that its place is free."""
        with self._lock:
            if adapter not in self._labels:
                return
            self._labels.discard(adapter)
            for kind in KINDS:
                self._tokens.remove(adapter, kind)
            self._requests.remove_by_labels({"adapter": adapter})

    def _label(self, name: str) -> str:
        if name == self._base or name in self._labels:
            return name
        if len(self._labels) >= self._max_labels:
            return OTHER
        self._labels.add(name)
        return name


class AdapterOperations:
    """What the catalog and the engine report about adapters: a manylora.server.catalog.CatalogObserver."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.load = Histogram(
            "manylora_adapter_load_seconds",
            "Work on an adapter: register, swap, remove; read (from disk), place (into the arena)",
            ["operation"],
            buckets=LOAD_SECONDS,
            registry=registry,
        )
        self._failures = Counter(
            "manylora_background_failures",
            "Failures that no caller hears of",
            ["operation"],
            registry=registry,
        )

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
        self._failures.labels(operation).inc()
