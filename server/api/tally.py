"""A Prometheus histogram that takes many values at once: prometheus-client's own takes microseconds for each.

A step gives a value for each of its streams, on the engine's thread, between the tokens of one step and the next.
"""

from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

PENDING = 4096
"""Values that are counted at a time, at most."""


class Tally(Collector):
    """Counts values by buckets. Any thread may call."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """``bounds``: the buckets' upper ends, ascending; what is above all of them is counted too."""
        self._name, self._meaning = name, meaning
        self._bounds = np.array([*bounds, np.inf])
        self._counts = np.zeros(len(self._bounds), dtype=np.int64)
        self._sum = 0.0
        self._pending: list[float] = []
        self._lock = Lock()
        registry.register(self)

    def observe_all(self, values: Sequence[float]) -> None:
        """Take values in."""
        with self._lock:
            self._pending += values
            if len(self._pending) >= PENDING:
                self._count()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return what is scraped."""
        with self._lock:
            self._count()
            counts, total = np.cumsum(self._counts).tolist(), self._sum
        names = [str(bound) if bound < np.inf else "+Inf" for bound in self._bounds.tolist()]
        yield HistogramMetricFamily(
            self._name, self._meaning, buckets=list(zip(names, counts, strict=True)), sum_value=total
        )

    def _count(self) -> None:
        values = np.array(self._pending)
        self._pending = []
        places = np.searchsorted(self._bounds, values)
        self._counts += np.bincount(places, minlength=len(self._bounds))
        self._sum += float(values.sum())
