"""From the engine's thread to the event loop: what a step brought, handed over while the next one computes.

The loop is woken by a byte in a pipe, which a native step writes after it has given the interpreter's lock up. Were it
woken before, it would ask for the lock that the engine still needs to launch the step, and both would wait.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence

from manylora.server.engine.pieces import Piece
from manylora.server.engine.request import SequenceOutput

Pieces = Sequence[Piece | SequenceOutput]
READ = 4096


def wake(descriptor: int) -> None:
    """Write a byte, unless it is -1. A pipe that is full wakes as well."""
    if descriptor >= 0:
        with contextlib.suppress(BlockingIOError):
            os.write(descriptor, b"\x01")


class Outbox:
    """Filled by the engine's thread, emptied on the event loop."""

    def __init__(self, take: Callable[[], Pieces], feed: Callable[[Pieces], None]) -> None:
        """``take`` returns what is to be handed over, on the engine's thread; ``feed`` is given it on the loop."""
        self._take = take
        self._feed = feed
        self._full: deque[Pieces] = deque()
        self._ends: tuple[int, int] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen, on the loop."""
        self._ends = os.pipe()
        for end in self._ends:
            os.set_blocking(end, False)
        self._loop = loop
        loop.add_reader(self._ends[0], self._woken)

    def close(self) -> None:
        """Stop listening, on the loop; nobody puts anything in any more."""
        if self._ends is not None and self._loop is not None:
            self._loop.remove_reader(self._ends[0])
            for end in self._ends:
                os.close(end)
            self._ends = None

    def put(self) -> int:
        """Put in what there is; return what to write a byte to so that the loop takes it, -1 if there is nothing."""
        pieces = self._take()
        if pieces:
            self._full.append(pieces)
        return self._ends[1] if self._full and self._ends is not None else -1

    def empty(self) -> None:
        """Hand over what is in it, in order. On the loop."""
        while self._full:
            self._feed(self._full.popleft())

    def _woken(self) -> None:
        assert self._ends is not None
        os.read(self._ends[0], READ)
        self.empty()
