"""One request to an OpenAI-compatible server: what was said, when each piece came, or how it failed.

Errors of a streamed request are results, not exceptions: a run counts them by kind. manylora's own routes are
manylora_client.py's, which asks through this.
"""

import json
import time
from dataclasses import dataclass, field

import httpx

from manylora.loadtest.material.answer import HUNG_UP, Answer, Json, error_code
from manylora.loadtest.material.dialects import Dialect, Endpoint, OpenAi


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


@dataclass(frozen=True, slots=True)
class Target:
    """A server."""

    root: str
    """Scheme, host and port, and whatever stands before /v1."""
    api_key: str | None = None
    endpoint: Endpoint = "completions"
    dialect: Dialect = field(default_factory=OpenAi)

    @classmethod
    def at(
        cls, url: str, api_key: str | None, endpoint: Endpoint, dialect: Dialect | None = None
    ) -> "Target":
        """Take a URL with or without /v1. Raises ValueError for one that isn't http(s)."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url {url}: begin it with http:// or https://")
        return cls(url.rstrip("/").removesuffix("/v1"), api_key, endpoint, dialect or OpenAi())

    @property
    def headers(self) -> dict[str, str]:
        """What authorises."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    @property
    def path(self) -> str:
        """Where to ask."""
        return self.root + self.dialect.route(self.endpoint)

    def body(self, model: str, prompt: str, options: Json) -> dict[str, object]:
        """Return a request's body; ``options`` are OpenAI's. Raises ValueError for a model it can't name."""
        return self.dialect.body(self.endpoint, model, prompt, options)


def new_client(target: Target, streams: int | None, timeouts: Timeouts) -> httpx.AsyncClient:
    """Return a client with a connection for each stream; None: for as many as are under way."""
    most = None if streams is None else streams + 1
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
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
                await _read(answer, response, target.dialect, hang_up_after)
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


async def _read(
    answer: Answer, response: httpx.Response, dialect: Dialect, hang_up_after: int | None
) -> None:
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
            answer.error, answer.error_message = f"in-stream ({error_code(chunk)})", data[:500]
            return
        dialect.take(answer, chunk, now)
        events += 1
        if events == hang_up_after:
            answer.error = HUNG_UP
            return
    if dialect.ends_with_done or answer.finish_reason is None:
        answer.error = "cut off"
        answer.error_message = (
            f"the stream ended without {'[DONE]' if dialect.ends_with_done else 'a reason'}"
        )
