"""Who of those that wait may go on: a bounded number at a time, and tenants one after the other."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """So many places, for which owners have turns however many wait for each. Lives on an event loop."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By owner, who has the next turn first. None of them is done, unless it was cancelled a moment ago."""

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Have a place within the ``async with``."""
        await self._enter(owner)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, owner: str) -> None:
        if self._free:
            self._free -= 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if not place.cancelled():  # it was given to who goes
                self._leave()
            raise

    def _leave(self) -> None:
        """Give a place to who has the next turn."""
        while self._waiting:
            owner, queue = self._waiting.popitem(last=False)
            place = queue.popleft()
            if queue:
                self._waiting[owner] = queue
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
