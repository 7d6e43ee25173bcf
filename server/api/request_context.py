"""What belongs to one request: its id, what is noted about it, one log line and one count when it is over.

The id is taken from the client or minted, and is in every response header, log line and error. Pure ASGI, because
middleware that wraps responses hides disconnects from streaming routes.
"""

import re
import time
from contextvars import ContextVar
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog import get_logger
from structlog.contextvars import bound_contextvars

from manylora.server.api.http_metrics import HttpCounters

log = get_logger("manylora.access")
HEADER = b"x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_current: ContextVar[str] = ContextVar("request_id", default="")
_notes: ContextVar["dict[str, object] | None"] = ContextVar("notes", default=None)
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
    notes = _notes.get()
    if notes is not None:
        notes.update((name, _cut(fact)) for name, fact in facts.items() if fact is not None)


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
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER, name.encode())]
            await send(message)

        notes: dict[str, object] = {}
        tokens = _current.set(name), _notes.set(notes)
        started = time.monotonic()
        try:
            with bound_contextvars(request_id=name):
                try:
                    await self._app(scope, receive, send_with_id)
                finally:
                    self._counters.count(scope, status)
                    if scope["path"] not in QUIET:
                        self._counters.served += 1
                        _log(scope, status, time.monotonic() - started, notes)
        finally:
            _current.reset(tokens[0])
            _notes.reset(tokens[1])


def _log(scope: Scope, status: int, seconds: float, notes: dict[str, object]) -> None:
    tell = log.info if status < 500 else log.warning
    path = _cut(scope["path"])
    tell("request", method=scope["method"], path=path, status=status, seconds=round(seconds, 4), **notes)


def _cut(fact: object) -> object:
    return f"{fact[:LONGEST_NOTE]}…" if isinstance(fact, str) and len(fact) > LONGEST_NOTE else fact
