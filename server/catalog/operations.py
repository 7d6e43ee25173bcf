"""Work that a cancelled caller can't leave half done, and that can be waited for. Knows no adapters."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

from manylora.server.catalog.progress import Progress
from manylora.server.errors import ShuttingDown

T = TypeVar("T")


class CallerLeft(Exception):
    """Unwinds an operation whose caller is gone. Nobody hears it."""


@dataclass(slots=True, eq=False)
class Caller:
    """Whoever waits for an operation."""

    left: bool = False
    is_awaited: bool = False
    """A client's request waits for it to be answered at all."""
    progress: Progress = field(default_factory=Progress)
    """How far the operation is."""
    _gone: asyncio.Event = field(default_factory=asyncio.Event)

    def leave(self) -> None:
        """Say that nobody waits any more."""
        self.left = True
        self._gone.set()

    async def unless_left(self, work: "asyncio.Future[T]") -> T:
        """Return what ``work`` does. Raises CallerLeft as soon as nobody waits; the work goes on then."""
        self.check()
        gone = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not work.done():
            work.add_done_callback(_hear)
            raise CallerLeft
        return work.result()

    def check(self) -> None:
        """Raise CallerLeft if nobody waits any more; called where the operation can still be undone."""
        if self.left:
            raise CallerLeft


def _hear(work: "asyncio.Future[T]") -> None:
    """Have asyncio not complain of an error that nobody waits for."""
    if not work.cancelled():
        work.exception()


class Operations:
    """The tasks of operations under way."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self.callers: set[Caller] = set()
        """Of operations under way."""
        self._closed = False

    async def run(
        self, work: Callable[[Caller], Coroutine[object, object, T]], caller: Caller | None = None
    ) -> T:
        """Run ``work`` in a task of its own; if this call is cancelled, the work learns it from its Caller.

        Raises ShuttingDown after ``close``.
        """
        if self._closed:
            raise ShuttingDown("the server is shutting down and takes no changes to adapters")
        caller = caller or Caller()
        task = self.spawn(work(caller))
        self.callers.add(caller)
        task.add_done_callback(lambda _: self.callers.discard(caller))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller.leave()
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
        _hear(task)
