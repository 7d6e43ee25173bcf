"""Metrics about adapters: tokens, requests and waiting by adapter, and how long loading and swapping take.

A mixture with a name counts under it, as an adapter does; all without one count as "mixture". Label values are
bounded: only so many names have labels of their own, the rest are "other", and what is deleted takes its series along.
"""

import threading
from collections.abc import Collection, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from manylora.adapters.records import AdapterRecord
from manylora.adapters.types import FreedAdapter
from manylora.server.catalog.types import (
    AUTO_LABEL,
    MIXTURE_LABEL,
    OTHER_LABEL,
    ResolvedModel,
    ResolvedPart,
    label_of,
)
from manylora.server.engine.observer import EndedRequest

LOAD_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SCORES = (-0.2, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MOST_VERSIONS = 8
"""Of an adapter, with series of their own: the newest."""
WAIT_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Coarser than for all requests together: there is a set of them for each adapter."""


class AdapterCounters:
    """Tokens, requests and seconds by adapter. Methods may be called from any thread."""

    def __init__(self, registry: CollectorRegistry, base_model: str, max_labels: int) -> None:
        self._base = label_of(base_model)
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
        self._parts = Counter(
            "manylora_mixture_parts",
            "Queued requests for a mixture, by each adapter in it",
            ["adapter"],
            registry=registry,
        )
        self._versions = Counter(
            "manylora_version_requests",
            "Queued requests for an adapter by its name, by the version that answers",
            ["adapter", "version"],
            registry=registry,
        )
        self._known_versions: dict[str, list[int]] = {}
        """Those that have series, by the adapter's label."""
        self._routed, self._scores = _of_auto(registry)
        self._first_token = self._seconds("time_to_first_token", "From arrival to the first token", registry)
        self._whole = self._seconds("request", "From arrival to the last token", registry)
        self._queue = self._seconds("queue", "From arrival to the first step", registry)

    @property
    def _by_name(self) -> Sequence[Counter | Histogram]:
        """All that have a series for each adapter."""
        seconds = self._whole, self._first_token, self._queue
        return self._requests, self._tokens, self._parts, self._versions, self._routed, *seconds

    @staticmethod
    def _seconds(name: str, meaning: str, registry: CollectorRegistry) -> Histogram:
        return Histogram(
            f"manylora_adapter_{name}_seconds",
            f"{meaning}, by adapter",
            ["adapter"],
            buckets=WAIT_SECONDS,
            registry=registry,
        )

    def count(self, ended: EndedRequest) -> None:
        """Count an ended request, its tokens and its seconds."""
        with self._lock:
            label = self._label(ended.adapter_label or self._base)
            self._requests.labels(label, ended.outcome).inc()
            self._tokens.labels(label, "prompt").inc(ended.prompt_tokens)
            self._tokens.labels(label, "generated").inc(ended.generated_tokens)
            self._whole.labels(label).observe(ended.seconds)
            if ended.queue_seconds is not None:
                self._queue.labels(label).observe(ended.queue_seconds)
            if ended.first_token_seconds is not None:
                self._first_token.labels(label).observe(ended.first_token_seconds)

    def count_queued(self, model: ResolvedModel, requests: int) -> None:
        """Count ``requests`` by the version that answers them, or by a mixture's parts."""
        with self._lock:
            if model.itself is not None:
                self._count_version(model.itself, requests)
            for name in (part.name for part in model.parts if part.weight):
                self._parts.labels(self._label(label_of(name))).inc(requests)

    def _count_version(self, answers: ResolvedPart, requests: int) -> None:
        label, version = self._label(label_of(answers.name)), answers.version
        if label == OTHER_LABEL:
            return
        known = self._known_versions.setdefault(label, [])
        if version not in known:
            known.append(version)
            known.sort()
            while len(known) > MOST_VERSIONS:
                oldest = known.pop(0)
                if oldest != version:
                    self._versions.remove(label, str(oldest))
        if version in known:
            self._versions.labels(label, str(version)).inc(requests)

    def count_routed(self, adapter: str, score: float) -> None:
        """Count a request that was given to this adapter, or to the base, as the nearest to its prompt."""
        with self._lock:
            self._routed.labels(self._label(label_of(adapter))).inc()
            self._scores.observe(score)

    def keep_only(self, names: Collection[str]) -> None:
        """Drop the series of all adapters and mixtures but these, so that their places are free."""
        with self._lock:
            for gone in self._labels.difference(map(label_of, names)):
                self._labels.discard(gone)
                self._known_versions.pop(gone, None)
                for metric in self._by_name:
                    metric.remove_by_labels({"adapter": gone})

    def _label(self, label: str) -> str:
        if label in (self._base, MIXTURE_LABEL, AUTO_LABEL) or label in self._labels:
            return label
        if len(self._labels) >= self._max_labels:
            return OTHER_LABEL
        self._labels.add(label)
        return label


def _of_auto(registry: CollectorRegistry) -> tuple[Counter, Histogram]:
    """Return what counts the model auto: what was chosen, and how near it was."""
    chosen = Counter(
        "manylora_auto_requests",
        "Requests for the model auto, by the adapter that they were given to",
        ["adapter"],
        registry=registry,
    )
    scores = Histogram(
        "manylora_auto_score",
        "How near prompts for the model auto were to the nearest examples: 1 is the same way, 0 is none",
        buckets=SCORES,
        registry=registry,
    )
    return chosen, scores


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
