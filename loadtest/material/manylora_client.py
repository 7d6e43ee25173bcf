"""A client of manylora's own: completions whole or streamed, adapters in and out, metrics."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.http_client import Target
from manylora.loadtest.material.http_client import ask as send

_SAMPLE = re.compile(r"(\w[\w:]*)(?:\{([^}]*)\})? (\S+)")


@dataclass(frozen=True, slots=True)
class Ask:
    """A greedy completion of exactly ``max_tokens`` tokens."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1

    def body(self, *, stream: bool) -> dict[str, object]:
        """Return the request's JSON."""
        return {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "n": self.n,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": stream,
        }


class Client:
    """Talks to one server. Use it in ``async with``."""

    def __init__(self, url: str, *, keep_alive: float = 2) -> None:
        """``keep_alive``: seconds that a connection waits for its next request; 0: each request has its own."""
        # Shorter than any server's, so that no request meets a connection that is being closed.
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=keep_alive
        )
        timeout = httpx.Timeout(connect=30, read=300, write=30, pool=300)
        self._target = Target(url)
        self._http = httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def complete(self, ask: Ask) -> Answer:
        """Return a whole answer (of the first choice, if there are more)."""
        return (await self.choices(ask))[0]

    async def choices(self, ask: Ask) -> list[Answer]:
        """Return all choices of a request; one Answer if it failed."""
        started = time.perf_counter()
        response = await self._http.post("/v1/completions", json=ask.body(stream=False))
        answers = [Answer(started, time.perf_counter()) for _ in range(ask.n)]
        if response.status_code != httpx.codes.OK:
            answers[0].refused(response)
            return answers[:1]
        for choice in response.json()["choices"]:
            answers[choice["index"]].add(choice, time.perf_counter())
        return answers

    async def score(self, model: str, prompt: Sequence[int], following: Sequence[int]) -> list[float]:
        """Return the log probabilities of tokens that are given. Raises httpx.HTTPStatusError."""
        body = {"model": model, "prompt": [*prompt, *following], "max_tokens": 0, "echo": True, "logprobs": 0}
        (choice,) = _record(await self._http.post("/v1/completions", json=body))["choices"]
        found: list[float] = choice["logprobs"]["token_logprobs"][len(prompt) :]
        return found

    async def stream(self, ask: Ask, *, hang_up_after: int | None = None) -> Answer:
        """Return an answer put together from a stream; with ``hang_up_after``, leave after so many events."""
        return await send(self._http, self._target, ask.body(stream=True), hang_up_after=hang_up_after)

    async def register(self, name: str, src: str, *, preload: bool = False) -> dict[str, Any]:
        """Register an adapter; return its record. Raises httpx.HTTPStatusError."""
        body = {"name": name, "src": src, "preload": preload}
        return _record(await self._http.post("/adapters", json=body))

    async def replace(self, name: str, src: str) -> dict[str, Any]:
        """Give a name its next version; return that record. Raises httpx.HTTPStatusError."""
        return _record(await self._http.put(f"/adapters/{name}", json={"src": src}))

    async def delete(self, name: str) -> dict[str, Any]:
        """Delete an adapter; return what that freed. Raises httpx.HTTPStatusError."""
        return _record(await self._http.delete(f"/adapters/{name}"))

    async def adapters(self) -> list[dict[str, Any]]:
        """List all adapters."""
        listed: list[dict[str, Any]] = _record(await self._http.get("/adapters"))["data"]
        return listed

    async def ready(self) -> bool:
        """Whether the server can serve; it can't once an audit of its pools has failed."""
        return (await self._http.get("/ready")).status_code == 200

    async def metrics(self) -> "Metrics":
        """Scrape /metrics."""
        return Metrics.parse((await self._http.get("/metrics")).text)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Samples by name and labels."""

    samples: dict[tuple[str, str], float]

    @classmethod
    def parse(cls, text: str) -> "Metrics":
        """Read Prometheus' text format."""
        found = (_SAMPLE.fullmatch(line) for line in text.splitlines() if not line.startswith("#"))
        return cls({(match[1], match[2] or ""): float(match[3]) for match in found if match is not None})

    def total(self, name: str, *labels: str) -> float:
        """Add up the samples of ``name`` whose labels contain all of ``labels`` (like 'state="used"')."""
        return sum(
            value
            for (sample, its), value in self.samples.items()
            if sample == name and all(label in its for label in labels)
        )


@dataclass(frozen=True, slots=True)
class Held:
    """What a server holds for its requests and adapters."""

    sequences: int
    blocks: int
    arena_rows: int
    adapters: int
    host_bytes: int


async def held(client: Client) -> Held:
    """Return what the server holds now."""
    metrics = await client.metrics()
    sequences = metrics.total("manylora_requests_running") + metrics.total("manylora_requests_waiting")
    return Held(
        int(sequences),
        int(metrics.total("manylora_kv_blocks", 'state="used"')),
        int(metrics.total("manylora_arena_rows", 'state="used"')),
        int(metrics.total("manylora_adapters")),
        int(metrics.total("manylora_adapter_host_bytes")),
    )


def _record(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        message = _message(response.content)
        raise httpx.HTTPStatusError(
            f"{response.status_code}: {message}", request=response.request, response=response
        )
    found: dict[str, Any] = response.json()
    return found


def _message(raw: bytes) -> str:
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return raw[:200].decode(errors="replace")
