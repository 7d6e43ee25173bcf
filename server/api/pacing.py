"""Lets requests begin by and by, and large answers be written by and by, while others are being generated.

To begin a request takes one to two milliseconds of Python, and half a million log probabilities take seconds. A step of
the engine asks for the interpreter some hundred times and would wait each time: a hundred requests at once, or one such
answer, would stop every stream for as long as they take together. With nothing to generate nothing waits.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from manylora.server.api.request_context import QUIET
from manylora.server.engine.pace import Tempo

SECONDS_A_REQUEST = 0.0025
"""Of a step's time, for each request that begins in it: so half of it and more is the engine's."""
FEWEST = 3
"""Requests that may begin in each step, however short it is."""
REST = 3.0
"""How many times as long as it has worked a thread rests, for each of those that rest in turn: so they have a third of
the interpreter at most, all together."""
PIECES_AT_A_TIME = 64
"""Pieces of an answer between two looks at the time: under 0.2 ms, of long lists some 1 ms."""
SHORTEST_REST = 0.001
LOOK_SECONDS = 0.01
STALLED_SECONDS = 0.25
"""A step that takes longer keeps nobody from beginning."""

Piece = TypeVar("Piece")


class Rests:
    """Breaks for threads that have much Python to do. Any thread may call."""

    def __init__(self, needed: Callable[[], bool]) -> None:
        """``needed`` says whether anybody would be held up."""
        self._needed = needed
        self._lock = threading.Lock()
        self._working = 0

    def between(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Yield the pieces, and rest between them in proportion to the processor time that they took (blocking)."""
        self._count(1)
        try:
            worked_until = time.thread_time()
            for number, piece in enumerate(pieces, 1):
                yield piece
                if number % PIECES_AT_A_TIME:
                    continue
                rest = (time.thread_time() - worked_until) * REST * self._working
                if rest >= SHORTEST_REST:
                    # Even none lets another thread go on that waits for the interpreter.
                    time.sleep(rest if self._needed() else 0)
                    worked_until = time.thread_time()
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        with self._lock:
            self._working += more


class Paced:
    """Around the application: its requests wait for their turns, in the order in which they came."""

    def __init__(self, app: ASGIApp, tempo: Callable[[], Tempo | None]) -> None:
        """``tempo`` returns None while nobody would be held up."""
        self._app = app
        self._tempo = tempo
        self._begun = 0
        """Requests that have begun since ``_step``."""
        self._step, self._looks = -1, 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request when its turn has come; probes don't wait."""
        if scope["type"] == "http" and scope["path"] not in QUIET:
            await self._turn()
        await self._app(scope, receive, send)

    async def _turn(self) -> None:
        if not self._waiting and self._room() > 0:
            self._begun += 1
            return
        loop = asyncio.get_running_loop()
        if not self._waiting:
            self._looks = 0
            loop.call_later(LOOK_SECONDS, self._look)
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _room(self) -> float:
        """Return how many more may begin now."""
        tempo = self._tempo()
        if tempo is None:
            return float("inf")
        if tempo.steps != self._step:
            self._step, self._begun, self._looks = tempo.steps, 0, 0
        return max(FEWEST, tempo.seconds / SECONDS_A_REQUEST) - self._begun

    def _look(self) -> None:
        """Let those begin whose turn it is, and look again if some are left."""
        self._looks += 1
        if self._looks * LOOK_SECONDS >= STALLED_SECONDS:
            self._begun = self._looks = 0
        while self._waiting and (self._waiting[0].done() or self._room() > 0):
            waiter = self._waiting.popleft()
            if not waiter.done():  # its client may have left
                self._begun += 1
                waiter.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)
