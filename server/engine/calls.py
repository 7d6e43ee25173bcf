"""Commands that the event loop gives the engine's thread and waits for. Runs none of them."""

import asyncio
from collections.abc import Callable

from manylora.adapters.types import FreedAdapter
from manylora.server.engine.engine import Engine

Command = Callable[[Engine], None]
Done = Callable[[FreedAdapter | Exception | None], None]


class EngineCalls:
    """What the engine has not answered. Lives on the event loop."""

    def __init__(
        self,
        put: Callable[[Command], None],
        on_loop: Callable[[Callable[[], None]], None],
        check: Callable[[], None],
    ) -> None:
        """``put`` has a command run between steps, ``on_loop`` is called there; ``check`` raises if nothing runs."""
        self._put = put
        self._on_loop = on_loop
        self._check = check
        self._open: set[asyncio.Future[FreedAdapter | None]] = set()

    async def between_steps(self, command: Command) -> None:
        """Run ``command`` on the engine's thread and wait for it; what it raises is raised here."""

        def run(engine: Engine, done: Done) -> None:
            command(engine)
            done(None)

        await self.call(run)

    async def until(self, command: Callable[[Engine], bool]) -> None:
        """Run ``command`` between steps, again and again until it says that it is done."""
        done = False

        def run(engine: Engine) -> None:
            nonlocal done
            done = command(engine)

        while not done:
            await self.between_steps(run)

    async def call(self, command: Callable[[Engine, Done], None]) -> FreedAdapter | None:
        """Run ``command`` between two steps and wait until it reports, then or later, or raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[FreedAdapter | None] = loop.create_future()
        self._check()

        def settle(result: FreedAdapter | BaseException | None) -> None:
            if future.done():
                return
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)

        def run(engine: Engine) -> None:
            try:
                command(engine, lambda freed: self._on_loop(lambda: settle(freed)))
            except Exception as error:
                failure = error
                self._on_loop(lambda: settle(failure))

        self._open.add(future)
        future.add_done_callback(self._open.discard)
        self._put(run)
        return await future

    def fail(self, error: Exception) -> None:
        """Raise ``error`` in all who wait."""
        for call in list(self._open):
            if not call.done():
                call.set_exception(error)
