"""Streams that are read as cheaply as Python can: when each event came, and nothing else.

A client on the server's own cores takes them from it; what httpx and a JSON parser take would be measured as the
server's.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

EVENT = b"data: {"
Told = Callable[["ReadStream"], None]


@dataclass
class ReadStream(asyncio.Protocol):
    """One streamed completion on a connection of its own."""

    body: bytes
    told: Told
    """Called at each event, and at the end."""
    times: list[float] = field(default_factory=list)
    """When each event came (time.perf_counter())."""
    status: bytes = b""
    ended: bool = False
    _rest: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        transport.write(head + b"content-length: %d\r\n\r\n" % len(self.body) + self.body)

    def data_received(self, data: bytes) -> None:
        """Count what came."""
        now = time.perf_counter()
        if not self.status:
            self.status = data.split(b" ", 2)[1]
        data = self._rest + data
        count = data.count(EVENT)
        self._rest = data[-(len(EVENT) - 1) :]
        if count:
            self.times += [now] * count
            self.told(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self.ended = True
        self.told(self)

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()


class Streams:
    """Streams that run at the same time, and waiting for what they have in common."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self.streams: list[ReadStream] = []
        self._changed = asyncio.Event()

    async def ask(
        self, model: str, prompt: Sequence[int], tokens: int, logprobs: int | None = None
    ) -> ReadStream:
        """Begin another one. With log probabilities each token is an event; without, each that completes text."""
        asked: dict[str, object] = {"model": model, "prompt": list(prompt), "max_tokens": tokens}
        asked |= {} if logprobs is None else {"logprobs": logprobs}
        options = {"stream": True, "ignore_eos": True, "temperature": 0.8, "top_p": 0.9, "seed": 1}
        body = json.dumps(asked | options).encode()
        stream = ReadStream(body, lambda _: self._changed.set())
        await asyncio.get_running_loop().create_connection(lambda: stream, self._host, self._port)
        self.streams.append(stream)
        return stream

    async def until(self, true: Callable[[], bool], seconds: float) -> None:
        """Wait. Raises TimeoutError, and RuntimeError if a stream was refused."""
        async with asyncio.timeout(seconds):
            while not true():
                self._changed.clear()
                await self._changed.wait()
                if any(stream.status not in (b"", b"200") for stream in self.streams):
                    raise RuntimeError("a stream was refused: the server's log says why")

    def close(self) -> None:
        """Hang up what still runs."""
        for stream in self.streams:
            stream.close()
