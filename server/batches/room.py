"""How much may be kept here: what is there and what is coming, counted together however many write at once."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from manylora.adapters.errors import StoreFull

OF_ONE_TENANT = 0.5
"""Of all the room: no tenant's files keep all others from leaving any."""


class Room:
    """Bytes of files by their owners; "" is whoever is no tenant. All methods block; any thread may call them."""

    def __init__(self, most: int, held: Callable[[], Mapping[str, int]]) -> None:
        """``most``: bytes of all together; ``held``: counts those of files that are whole."""
        self._most, self._count = most, held
        self._lock = threading.Lock()
        self._held = Counter[str]()
        self._coming = Counter[str]()

    def look(self) -> None:
        """Count again what is there: files went, and batches made some."""
        with self._lock:
            self._held = Counter(self._count())

    def take(self, nbytes: int, owner: str) -> None:
        """Have so much for what is being written. Raises StoreFull."""
        with self._lock:
            if self._over(nbytes, owner) is not None:
                self._held = Counter(self._count())
            over = self._over(nbytes, owner)
            if over is not None:
                raise StoreFull(f"{over}; delete some")
            self._coming[owner] += nbytes

    def _over(self, nbytes: int, owner: str) -> str | None:
        """Return which limit so much more would be over; None: none."""
        if owner and self._held[owner] + self._coming[owner] + nbytes > OF_ONE_TENANT * self._most:
            return "your files take as much as one tenant's may (half of --files-gib)"
        if self._held.total() + self._coming.total() + nbytes > self._most:
            return "the files kept here are at their limit (--files-gib)"
        return None

    def give_back(self, nbytes: int, owner: str) -> None:
        """Let go of what was taken and isn't kept."""
        with self._lock:
            self._coming[owner] -= nbytes

    @contextmanager
    def keeping(self, nbytes: int, owner: str) -> Iterator[None]:
        """Let what was taken be held from the block's end on, unless it fails."""
        with self._lock:
            yield
            self._coming[owner] -= nbytes
            self._held[owner] += nbytes
