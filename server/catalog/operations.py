"""Work that a cancelled caller can't leave half done, and that can be waited for. Knows no adapters."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TypeVar

from manylora.server.errors import ShuttingDown

T = TypeVar("T")


class CallerLeft(Exception):
    """Unwinds an operation whose caller is gone. Nobody hears it."""


@dataclass(slots=True, eq=False)
class Caller:
    """Whoever waits for an operation."""

    left: bool = False

    def check(self) -> None:
        """Raise CallerLeft if nobody waits any more; called where the operation can still be undone."""
        if self.left:
            raise CallerLeft


class Operations:
    """The tasks of operations under way."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self.callers: set[Caller] = set()
        """Of operations under way."""
        self._closed = False

    async def run(self, work: Callable[[Caller], Coroutine[object, object, T]]) -> T:
        """Run ``work`` in a task of its own; if this call is cancelled, the work learns it from its Caller.

        Raises ShuttingDown after ``close``.
        """
        if self._closed:
            raise ShuttingDown("the server is shutting down and takes no changes to adapters")
        caller = Caller()
        task = self.spawn(work(caller))
        self.callers.add(caller)
        task.add_done_callback(lambda _: self.callers.discard(caller))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller.left = True
            raise

    def spawn(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Run ``work`` in the background."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        while tasks := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Take no more operations and wait for those under way."""
        self._closed = True
        await self.settled()

    def _ended(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # heard, even if the caller has left: asyncio need not complain
