"""Streams that ask again and again, each for one model, and when each of their tokens came. For checks of shares."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

TOKENS_APART = 7
"""Prompts differ by their first token: no prefix cache knows them."""


class Refused(Exception):
    """A stream got no answer. One line."""


@dataclass(slots=True)
class StandingLoad:
    """What has come so far."""

    url: str
    input_tokens: int
    output_tokens: int
    times: dict[str, list[float]] = field(default_factory=dict)
    """By model when its tokens came (time.perf_counter())."""
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when, seconds) since the token before, of all streams."""
    asked: int = 0
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def tokens(self, start: float, end: float) -> Counter[str]:
        """Return how many tokens came in [start, end), by model."""
        return Counter({m: sum(start <= t < end for t in times) for m, times in self.times.items()})

    async def until(self, tokens: int) -> None:
        """Return when so many more tokens have come."""
        ends = tokens + sum(map(len, self.times.values()))
        while sum(map(len, self.times.values())) < ends:
            self.check()
            await asyncio.sleep(0.02)

    def check(self) -> None:
        """Raise Refused if a stream got no answer."""
        for task in self._tasks:
            if task.done():
                task.result()

    def gaps_within(self, spans: Sequence[tuple[float, float]]) -> list[float]:
        """Return the gaps that ended in one of the spans."""
        return [gap for when, gap in self.gaps if any(start <= when < end for start, end in spans)]

    @asynccontextmanager
    async def running(self, models: Sequence[str]) -> AsyncIterator[None]:
        """Keep a stream for each of ``models`` (one may be named several times) until the block ends."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits) as client:
            tasks = {asyncio.create_task(self._stream(client, model)) for model in models}
            self._tasks |= tasks
            try:
                yield
                self.check()
            finally:
                self._tasks -= tasks
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self, client: httpx.AsyncClient, model: str) -> None:
        times = self.times.setdefault(model, [])
        while True:
            before: float | None = None
            async with client.stream(
                "POST", f"{self.url}/v1/completions", json=self._body(model)
            ) as response:
                if response.status_code != httpx.codes.OK:
                    raise Refused(f"{model}: {response.status_code} {(await response.aread())[:200]!r}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.perf_counter()
                    times.append(now)
                    if before is not None:
                        self.gaps.append((now, now - before))
                    before = now

    def _body(self, model: str) -> dict[str, object]:
        self.asked += 1
        return {
            "model": model,
            "prompt": [300 + TOKENS_APART * self.asked % 30_000, *range(10, 9 + self.input_tokens)],
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
