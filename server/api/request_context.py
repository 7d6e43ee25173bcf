"""What belongs to one request: its id, what is noted about it, one log line and one count when it is over.

The id is taken from the client or minted, and is in every response header, log line and error. Pure ASGI, because
middleware that wraps responses hides disconnects from streaming routes.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog import get_logger
from structlog.contextvars import bound_contextvars

from manylora.server.api.http_metrics import HttpCounters

log = get_logger("manylora.access")
HEADER = b"x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_current: ContextVar[str] = ContextVar("request_id", default="")
PROCESSING, VERSION = b"openai-processing-ms", (b"openai-version", b"2020-10-01")
"""How long it took until the answer began; and which of OpenAI's APIs this is."""


@dataclass(slots=True)
class _Kept:
    """What is kept of a request until it is over."""

    notes: dict[str, object] = field(default_factory=dict)
    headers: list[Callable[[], Mapping[str, str]]] = field(default_factory=list)
    ends: list[Callable[[int], None]] = field(default_factory=list)


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)
QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Paths that probes ask every few seconds; they aren't logged."""
CLIENT_GONE = 499
"""The status, in logs and metrics, of a request whose client left before it was answered."""
LONGEST_NOTE = 300
"""Characters of a path, a name or a reason that are logged."""


def request_id() -> str:
    """Return the id of the request that is being served."""
    return _current.get()


def note(**facts: object) -> None:
    """Have the log line of the request that is being served say this too; texts are cut."""
    kept = _kept.get()
    if kept is not None:
        kept.notes.update((name, _cut(fact)) for name, fact in facts.items() if fact is not None)


def noted() -> Mapping[str, object]:
    """Return what has been noted of the request that is being served."""
    kept = _kept.get()
    return {} if kept is None else kept.notes


def at_end(call: Callable[[int], None]) -> None:
    """Have this called with the status when the request is over: once its last byte is sent, or its client has left."""
    kept = _kept.get()
    if kept is not None:
        kept.ends.append(call)


def with_headers(source: Callable[[], Mapping[str, str]]) -> None:
    """Have the answer carry the headers that this returns when it begins."""
    kept = _kept.get()
    if kept is not None:
        kept.headers.append(source)


class RequestContext:
    """Gives every request its id, its log line and its count."""

    def __init__(self, app: ASGIApp, counters: HttpCounters) -> None:
        self._app = app
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER, b"").decode("latin-1")
        name = given if _SANE.fullmatch(given) else uuid4().hex
        status, ended = CLIENT_GONE, False
        started = time.monotonic()
        kept = _Kept()

        async def send_with_id(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_headers(name, kept, started)]
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        tokens = _current.set(name), _kept.set(kept)
        try:
            with bound_contextvars(request_id=name):
                try:
                    await self._app(scope, receive, send_with_id)
                except Exception:
                    # What was answered with a 500 is logged, and over: uvicorn would log it again, and close the
                    # connection without having said so. An answer that broke off it shall close.
                    if not ended:
                        raise
                finally:
                    _end(kept, status)
                    self._counters.count(scope, status)
                    if scope["path"] not in QUIET:
                        self._counters.served += 1
                        _log(scope, status, time.monotonic() - started, kept.notes)
        finally:
            _current.reset(tokens[0])
            _kept.reset(tokens[1])


def _headers(name: str, kept: _Kept, started: float) -> list[tuple[bytes, bytes]]:
    spent = round((time.monotonic() - started) * 1000)
    own = [(HEADER, name.encode()), (PROCESSING, str(spent).encode()), VERSION]
    more = [pair for source in kept.headers for pair in source().items()]
    return own + [(key.encode(), value.encode()) for key, value in more]


def _end(kept: _Kept, status: int) -> None:
    for call in kept.ends:
        try:
            call(status)
        except Exception as error:  # the others must have their turn
            log.error("what follows a request failed", exc_info=error)


def _log(scope: Scope, status: int, seconds: float, notes: dict[str, object]) -> None:
    tell = log.info if status < 500 else log.warning
    path = _cut(scope["path"])
    tell("request", method=scope["method"], path=path, status=status, seconds=round(seconds, 4), **notes)


def _cut(fact: object) -> object:
    return f"{fact[:LONGEST_NOTE]}…" if isinstance(fact, str) and len(fact) > LONGEST_NOTE else fact
