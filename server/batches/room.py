"""How much may be kept here: what is there and what is coming, counted together however many write at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from manylora.adapters.errors import StoreFull


class Room:
    """Bytes of all files together. All methods block; any thread may call them."""

    def __init__(self, most: int, held: Callable[[], int]) -> None:
        """``most``: bytes of all; ``held``: counts those of files that are whole."""
        self._most, self._count = most, held
        self._lock = threading.Lock()
        self._held, self._coming = 0, 0

    def look(self) -> None:
        """Count again what is there: files went, and batches made some."""
        with self._lock:
            self._held = self._count()

    def take(self, nbytes: int) -> None:
        """Have so much for what is being written. Raises StoreFull."""
        with self._lock:
            if self._is_over(nbytes):
                self._held = self._count()
            if self._is_over(nbytes):
                raise StoreFull("the files kept here are at their limit (--files-gib); delete some")
            self._coming += nbytes

    def _is_over(self, nbytes: int) -> bool:
        return self._held + self._coming + nbytes > self._most

    def give_back(self, nbytes: int) -> None:
        """Let go of what was taken and isn't kept."""
        with self._lock:
            self._coming -= nbytes

    @contextmanager
    def keeping(self, nbytes: int) -> Iterator[None]:
        """Let what was taken be held from the block's end on, unless it fails."""
        with self._lock:
            yield
            self._coming -= nbytes
            self._held += nbytes
