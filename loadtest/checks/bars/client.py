"""A small asynchronous client: completions whole or streamed, adapters in and out, metrics. Errors are results."""

import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

HUNG_UP = "hung up"
_SAMPLE = re.compile(r"(\w[\w:]*)(?:\{([^}]*)\})? (\S+)")


@dataclass(slots=True)
class Answer:
    """What a completion gave: text, tokens as text, their log probabilities; or how it failed."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    status: int = 200
    error: str = ""

    @property
    def complete(self) -> bool:
        """Whether it ended as it should."""
        return not self.error and self.finish_reason is not None

    def same_as(self, other: "Answer") -> bool:
        """Whether both are complete and equal, token for token and bit for bit in their log probabilities."""
        return (
            self.complete
            and other.complete
            and (self.text, self.tokens, self.logprobs) == (other.text, other.tokens, other.logprobs)
        )

    def add(self, choice: dict[str, Any]) -> None:
        """Take in a choice of a completion, whole or a piece."""
        self.text += choice["text"]
        if choice["logprobs"] is not None:
            self.tokens += choice["logprobs"]["tokens"]
            self.logprobs += choice["logprobs"]["token_logprobs"]
        self.finish_reason = choice["finish_reason"] or self.finish_reason


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

    def __init__(self, url: str) -> None:
        # Shorter than any server's, so that no request meets a connection that is being closed.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
        timeout = httpx.Timeout(connect=30, read=300, write=30, pool=300)
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
        response = await self._http.post("/v1/completions", json=ask.body(stream=False))
        if response.status_code != 200:
            return [Answer(status=response.status_code, error=_message(response.content))]
        answers = [Answer() for _ in range(ask.n)]
        for choice in response.json()["choices"]:
            answers[choice["index"]].add(choice)
        return answers

    async def stream(self, ask: Ask, *, hang_up_after: int | None = None) -> Answer:
        """Return an answer put together from a stream; with ``hang_up_after``, leave after so many events."""
        answer = Answer()
        try:
            await self._stream(ask, answer, hang_up_after)
        except httpx.TransportError as error:
            answer.error = repr(error)
        return answer

    async def _stream(self, ask: Ask, answer: Answer, hang_up_after: int | None) -> None:
        events = 0
        body = ask.body(stream=True)
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.status, answer.error = response.status_code, _message(await response.aread())
                return
            async with aclosing(_events(response)) as stream:
                async for event in stream:
                    if "error" in event:
                        answer.error = str(event["error"]["message"])
                        continue
                    for choice in event["choices"]:
                        answer.add(choice)
                    events += 1
                    if hang_up_after is not None and events >= hang_up_after:
                        answer.error = HUNG_UP
                        return

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


async def _events(response: httpx.Response) -> AsyncGenerator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


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
