"""The request id: taken from the client or minted, in every response header, log line and error.

Pure ASGI, because middleware that wraps responses hides disconnects from streaming routes.
"""

import re
import time
from contextvars import ContextVar
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog import get_logger
from structlog.contextvars import bound_contextvars

log = get_logger("manylora.access")
HEADER = b"x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._-]{1,128}")
_current: ContextVar[str] = ContextVar("request_id", default="")
QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Paths that probes ask every few seconds; they aren't logged."""


def request_id() -> str:
    """Return the id of the request that is being served."""
    return _current.get()


class RequestContext:
    """Gives every request its id and one log line when it is over."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER, b"").decode("latin-1")
        name = given if _SANE.fullmatch(given) else uuid4().hex
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (HEADER, name.encode())]
            await send(message)

        token = _current.set(name)
        started = time.monotonic()
        try:
            with bound_contextvars(request_id=name):
                try:
                    await self._app(scope, receive, send_with_id)
                finally:
                    if scope["path"] not in QUIET:
                        seconds = round(time.monotonic() - started, 4)
                        log.info(
                            "request",
                            method=scope["method"],
                            path=scope["path"],
                            status=status,
                            seconds=seconds,
                        )
        finally:
            _current.reset(token)
