"""One request to an OpenAI-compatible server: what was said, when each piece came, or how it failed.

Errors of a streamed request are results, not exceptions: a run counts them by kind. manylora's own routes are
manylora_client.py's, which asks through this.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

Endpoint = Literal["completions", "chat"]
Json = Mapping[str, object]
HUNG_UP = "hung up"
"""The error of an answer that this side left."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds of silence that are too many, for each part of a request."""

    connect: float = 10.0
    read: float = 120.0
    """Also the longest wait for a first token."""
    write: float = 30.0
    pool: float = 10.0
    """Every stream has a connection of its own, so this wait means a fault here."""

    def to_httpx(self) -> httpx.Timeout:
        """Return httpx's form."""
        return httpx.Timeout(connect=self.connect, read=self.read, write=self.write, pool=self.pool)


@dataclass(slots=True)
class Answer:
    """What one request gave. Times are time.perf_counter() seconds."""

    started: float = 0.0
    ended: float = 0.0
    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: list[str] = field(default_factory=list)
    """As text, where log probabilities were asked for."""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    status: int = 200
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """As the server's usage says; None if it says nothing."""
    error: str | None = None
    """Its kind: "connect", "timeout (read)", "http 429 (queue_full)", "cut off", "in-stream (…)", "bad event",
    "hung up"."""
    error_message: str = ""

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(self.pieces)

    @property
    def complete(self) -> bool:
        """Whether it ended as it should."""
        return self.error is None and self.finish_reason is not None

    def same_as(self, other: "Answer") -> bool:
        """Whether both are complete and equal, token for token and bit for bit in their log probabilities."""
        mine, its = ((one.text, one.tokens, one.logprobs) for one in (self, other))
        return self.complete and other.complete and mine == its

    def add(self, choice: Mapping[str, Any], now: float) -> None:
        """Take in a choice of a completion, whole or a piece of one, that came at ``now``."""
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text:
            self.pieces.append(text)
            self.times.append(now)
        logprobs = choice.get("logprobs") or {}
        self.tokens += logprobs.get("tokens") or []
        self.logprobs += logprobs.get("token_logprobs") or []
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def refused(self, response: httpx.Response) -> None:
        """Take in an answer whose status isn't 200; its body must have been read."""
        try:
            body = response.json()
        except ValueError:
            body = {}
        code = _code(body if isinstance(body, dict) else {})
        self.status = response.status_code
        self.error = f"http {response.status_code}" + (f" ({code})" if code else "")
        self.error_message = response.text[:500]

    @property
    def output_tokens(self) -> int:
        """Tokens by usage, else pieces of text."""
        return len(self.times) if self.completion_tokens is None else self.completion_tokens

    @property
    def first_token_seconds(self) -> float | None:
        """From asking to the first piece of text."""
        return self.times[0] - self.started if self.times else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Target:
    """A server."""

    root: str
    """Scheme, host and port, and whatever stands before /v1."""
    api_key: str | None = None
    endpoint: Endpoint = "completions"

    @classmethod
    def at(cls, url: str, api_key: str | None, endpoint: Endpoint) -> "Target":
        """Take a URL with or without /v1. Raises ValueError for one that isn't http(s)."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url {url}: begin it with http:// or https://")
        return cls(url.rstrip("/").removesuffix("/v1"), api_key, endpoint)

    @property
    def headers(self) -> dict[str, str]:
        """What authorises."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    @property
    def path(self) -> str:
        """Where to ask."""
        return f"{self.root}/v1/{'chat/completions' if self.endpoint == 'chat' else 'completions'}"

    def body(self, model: str, prompt: str, options: Json) -> dict[str, object]:
        """Return a request's body."""
        if self.endpoint == "chat":
            return {"model": model, "messages": [{"role": "user", "content": prompt}], **options}
        return {"model": model, "prompt": prompt, **options}


def new_client(target: Target, streams: int, timeouts: Timeouts) -> httpx.AsyncClient:
    """Return a client with a connection for each stream."""
    limits = httpx.Limits(max_connections=streams + 1, max_keepalive_connections=streams + 1)
    return httpx.AsyncClient(headers=target.headers, timeout=timeouts.to_httpx(), limits=limits)


async def ask(
    client: httpx.AsyncClient, target: Target, body: Json, *, hang_up_after: int | None = None
) -> Answer:
    """Send a request with ``stream: true`` in ``body`` and read it to its end.

    With ``hang_up_after``, leave after so many events; the error is HUNG_UP then.
    """
    answer = Answer(time.perf_counter())
    try:
        async with client.stream("POST", target.path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                answer.refused(response)
            else:
                await _read(answer, response, hang_up_after)
    except httpx.ConnectError as error:
        answer.error, answer.error_message = "connect", str(error)
    except httpx.TimeoutException as error:
        part = type(error).__name__.removesuffix("Timeout").lower()
        answer.error, answer.error_message = f"timeout ({part})", str(error)
    except (httpx.RemoteProtocolError, httpx.ReadError) as error:
        answer.error, answer.error_message = "cut off", str(error)
    except httpx.HTTPError as error:
        answer.error, answer.error_message = f"transport ({type(error).__name__})", str(error)
    answer.ended = time.perf_counter()
    return answer


async def _read(answer: Answer, response: httpx.Response, hang_up_after: int | None) -> None:
    events = 0
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue  # comments that keep the connection alive, event names, blank lines
        now, data = time.perf_counter(), line[5:].strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            answer.error, answer.error_message = "bad event", data[:200]
            return
        if chunk.get("error"):
            answer.error, answer.error_message = f"in-stream ({_code(chunk)})", data[:500]
            return
        _take(answer, chunk, now)
        events += 1
        if events == hang_up_after:
            answer.error = HUNG_UP
            return
    answer.error = "cut off"
    answer.error_message = "the stream ended without [DONE]"


def _take(answer: Answer, chunk: Json, now: float) -> None:
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
        answer.completion_tokens = usage.get("completion_tokens", answer.completion_tokens)
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        answer.add(choice, now)


def _code(body: Json) -> str:
    """Return what an error envelope calls its error."""
    error = body.get("error")
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "")
    return ""
