"""Watches the load client itself: a client that is the limit measures itself, and must say so.

The event loop's lag is how late a timer fires; the CPU share is the time that this process computes, of one core
(the loop has one thread).
"""

import asyncio
import time
from dataclasses import dataclass

from manylora.loadtest.material.summary import Spread

TICK = 0.02
"""Seconds between two looks."""
BUSY = 0.8
"""CPU share from which the client is the limit."""
LATE = 0.1, 0.005
"""A lag at p90 over this part of the gap between tokens, and over these seconds, spoils what is measured."""


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """What the client spent."""

    lag: Spread
    """Seconds."""
    cpu_share: float
    """Of one core."""

    def verdict(self, token_gap: float) -> str | None:
        """Return why the client is the limit, if it is. ``token_gap``: median seconds between two tokens."""
        if self.cpu_share >= BUSY:
            return f"its thread is busy {100 * self.cpu_share:.0f} % of the time; run several clients"
        part, least = LATE
        if self.lag.p90 > max(part * token_gap, least):
            return (
                f"its event loop is {1000 * self.lag.p90:.1f} ms late at p90; "
                "give it a core of its own or a machine of its own"
            )
        return None

    def to_json(self) -> dict[str, object]:
        """Return the numbers as JSON values."""
        return {"event_loop_lag_seconds": self.lag.to_json(), "cpu_share": self.cpu_share}


class LoadMeter:
    """Measures from ``__aenter__`` to ``__aexit__``; ``result`` is there afterwards."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._task: asyncio.Task[None] | None = None
        self._wall = self._cpu = 0.0
        self.result = ClientLoad(Spread.of([]), 0.0)

    async def __aenter__(self) -> "LoadMeter":
        """Begin."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End, and sum up."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        wall = max(1e-9, time.perf_counter() - self._wall)
        self.result = ClientLoad(Spread.of(self._lags), (time.process_time() - self._cpu) / wall)

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self._lags.append(max(0.0, time.perf_counter() - due))
