"""Well-behaved streams, /health and the client's own stalls, timed in one process that does nothing else.

What arrives is noted with its time and read afterwards, so that the client costs little while it measures.
"""

import asyncio
import contextlib
import json
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

from manylora.loadtest.checks.bars.hostile.exchange import head

HEALTH_SECONDS = 0.1
"""Between two looks at /health, each on a connection of its own."""
TICK_SECONDS = 0.005
LAG_NOTED = 0.005
MAX_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Lane:
    """One client: it asks its questions in turn, for as long as it is let."""

    name: str
    bodies: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """What a stream gave: each event's time and line."""

    asked: float
    status: int
    arrived: tuple[float, ...]
    lines: tuple[bytes, ...]

    def tokens(self) -> list[tuple[str, float]]:
        """Return each token's text and log probability; a failure is a token that no answer has."""
        found: list[tuple[str, float]] = []
        ended = False
        for line in self.lines:
            if line == b"data: [DONE]":
                ended = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return [*found, (f"failed: {event['error']['message']}", 0.0)]
            for choice in event["choices"]:
                content = (choice["logprobs"] or {}).get("content") or []
                found += [(token["token"], token["logprob"]) for token in content]
        return found if self.status == 200 and ended else [*found, (f"cut off, status {self.status}", 0.0)]

    def gaps(self) -> list[tuple[float, float]]:
        """Return from when to when each gap between two tokens lasted."""
        times = [at for at, line in zip(self.arrived, self.lines, strict=True) if b'"logprob"' in line]
        return list(pairwise(times))


@dataclass(slots=True)
class Watch:
    """All that was seen beside the hostile requests."""

    streams: dict[tuple[str, int], list[Stream]] = field(default_factory=dict)
    """By lane and question."""
    health: list[tuple[float, float, int]] = field(default_factory=list)
    """From when to when, and the status; 0: none."""
    lags: list[tuple[float, float]] = field(default_factory=list)
    """From when to when this process wasn't run though it wanted to."""

    def stalled(self, begin: float, end: float) -> float:
        """Return how much of this time the client itself stood still, in seconds."""
        return sum(max(0.0, min(end, to) - max(begin, at)) for at, to in self.lags)

    def median_gap(self, lane: str) -> float:
        """Return the median time between two tokens of a lane's streams, in seconds."""
        gaps = [to - at for at, to in self.gaps(lane)]
        return statistics.median(gaps) if gaps else float("nan")

    def gaps(self, lane: str) -> list[tuple[float, float]]:
        """Return all gaps of a lane's streams."""
        mine = (found for (name, _), streams in self.streams.items() if name == lane for found in streams)
        return [gap for stream in mine for gap in stream.gaps()]


async def ask(url: str, body: bytes) -> Stream:
    """Stream one chat completion."""
    asked, arrived, lines = time.monotonic(), [], []
    host, port = address(url)
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE)
    try:
        writer.write(head("POST", "/v1/chat/completions", len(body)) + body)
        status = int((await reader.readline()).split(b" ", 2)[1] or b"0")
        while line := await reader.readline():
            if line.startswith((b"data: ", b'{"error"')):
                arrived.append(time.monotonic())
                lines.append(line.rstrip() if line.startswith(b"data: ") else b"data: " + line.rstrip())
    finally:
        writer.transport.abort()
    return Stream(asked, status, tuple(arrived), tuple(lines))


def address(url: str) -> tuple[str, int]:
    """Return the host and port of a server's URL."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 80


async def watch(url: str, lanes: tuple[Lane, ...], over: asyncio.Event) -> Watch:
    """Stream on all lanes, look at /health and measure this process's stalls until ``over``."""
    seen = Watch()
    async with asyncio.TaskGroup() as tasks:
        for lane in lanes:
            tasks.create_task(_stream(url, lane, seen, over))
        tasks.create_task(_health(url, seen, over))
        tasks.create_task(_lags(seen, over))
    return seen


async def _stream(url: str, lane: Lane, seen: Watch, over: asyncio.Event) -> None:
    number = 0
    while not over.is_set():
        question = number % len(lane.bodies)
        try:
            found = await ask(url, lane.bodies[question])
        except OSError:
            found = Stream(time.monotonic(), 0, (), ())
            await asyncio.sleep(TICK_SECONDS)
        seen.streams.setdefault((lane.name, question), []).append(found)
        number += 1


async def _health(url: str, seen: Watch, over: asyncio.Event) -> None:
    host, port = address(url)
    while not over.is_set():
        began, status = time.monotonic(), 0
        with contextlib.suppress(OSError, IndexError, ValueError, TimeoutError):
            async with asyncio.timeout(60):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(head("GET", "/health", 0))
                    status = int((await reader.readline()).split(b" ", 2)[1])
                finally:
                    writer.transport.abort()
        seen.health.append((began, time.monotonic(), status))
        await asyncio.sleep(HEALTH_SECONDS)


async def _lags(seen: Watch, over: asyncio.Event) -> None:
    while not over.is_set():
        due = time.monotonic() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        now = time.monotonic()
        if now - due > LAG_NOTED:
            seen.lags.append((due, now))
