"""Threads that read adapters from disk into host memory: for requests that wait, and ahead of requests that come.

An adapter that is being read is not read a second time, whoever asks. Callable from any thread.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_cache import HeldAdapter
from manylora.server.engine.observer import EngineObserver

READERS = 2
"""Threads. They don't step back, as others beside the engine do: a request waits for whatever they read."""
AHEAD = 8
"""Reads under way from which on nothing is read ahead: those for whom a request waits would wait for these."""
Arrived = Callable[[int, AdapterWeights | Exception], None]
"""Is given an adapter's weights, or why they can't be read, on a reader's thread."""
Hold = Callable[[AdapterWeights], AdapterWeights]
"""Brings weights into the form in which the host holds them."""


def as_they_are(weights: AdapterWeights) -> AdapterWeights:
    """Hold weights as they were read."""
    return weights


class AdapterReaders:
    """Reads, each adapter once at a time."""

    def __init__(self, arrived: Arrived, observer: EngineObserver, hold: Hold = as_they_are) -> None:
        self._pool = ThreadPoolExecutor(READERS, "adapter-reader")
        self._arrived = arrived
        self._observer = observer
        self._hold = hold
        self._lock = threading.Lock()
        self._under_way: set[int] = set()

    def read(self, held: HeldAdapter) -> None:
        """Read an adapter, unless that is under way: ``arrived`` is told in any case."""
        with self._lock:
            if held.adapter_id in self._under_way:
                return
            self._under_way.add(held.adapter_id)
        self._pool.submit(self._read, held)

    def read_ahead(self, held: HeldAdapter) -> None:
        """Read an adapter that a request is about to ask for, if it is on disk only and readers have time."""
        if held.tier == "disk" and not held.retired and len(self._under_way) < AHEAD:
            self.read(held)

    def close(self) -> None:
        """Let go what hasn't begun; don't wait for the rest."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def taken(self, adapter_id: int) -> None:
        """Note that what ``arrived`` was told has been taken in: from now on the adapter may be read again."""
        with self._lock:
            self._under_way.discard(adapter_id)

    def _read(self, held: HeldAdapter) -> None:
        began = time.perf_counter()
        result: AdapterWeights | Exception
        try:
            result = self._hold(held.load_from())
            self._observer.adapter_read(time.perf_counter() - began)
        except Exception as error:
            result = error
        self._arrived(held.adapter_id, result)
