"""What a client may do to a connection before a request exists: size and time of heads and bodies, and how many.

uvicorn's parser takes heads of any size and waits for ever; this subclass of its protocol counts what arrives.
Bodies' sizes are body.py's. Who breaks a limit gets an answer in the envelope and is cut off.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar
from uuid import uuid4

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PIECE = 8 << 10
"""Bytes that the parser gets at once: how far over a limit it may read."""
LONGEST_URL = 65535
"""Bytes of path and query that the parser can take apart."""
RESERVE = 32
"""Connections beyond the limit that are taken for probes."""
PROBES = frozenset({b"/health", b"/ready", b"/metrics"})
OFFERS = frozenset({b"connection", b"upgrade", b"http2-settings"})
CROWDED = ("too_many_connections", "the server has too many connections; try again")
LINGER_SECONDS = 2.0
"""For how long a client that is cut off may go on sending: closing at once would take the answer from it."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of every connection; server/config.py says what each is for."""

    connections: int = 4096
    head_bytes: int = 64 << 10
    headers: int = 128
    head_seconds: float = 30.0
    body_seconds: float = 120.0
    upload_seconds: float = 1800.0
    """For a form with an adapter's files."""
    send_seconds: float = 300.0
    idle_seconds: float = 75.0


class Refused(Exception):
    """Ends the parser's work; the answer is sent."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection whose client owes something only for a while. Made by ``bounded``."""

    limits: ClassVar[ConnectionLimits]
    owing: ClassVar[dict["BoundedProtocol", None]]
    """Connections whose clients have yet to send a head or a body, in the order in which they began to owe it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._app = self.app
        self.timeout_keep_alive = self.limits.idle_seconds  # type: ignore[assignment]  # any number will do
        self._timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._refused = self._probes_only = False
        self._in_message = self._in_head = False
        self._took_body = self._offered = False
        self._piece = b""
        self._empty_bytes = 0
        """Bytes of the head, or of its body since the last that carried any of it."""

    # What the transport says

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, in the place of one that owes the longest if there are too many."""
        super().connection_made(transport)
        self.owing[self] = None
        while len(self.connections) > self.limits.connections:
            longest = next(iter(self.owing))
            if longest is self:
                break
            longest._drop()
        excess = len(self.connections) - self.limits.connections
        if excess > RESERVE:
            self._refuse(503, *CROWDED)
            return
        self._probes_only = excess > 0
        self._expect(self.limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.owing.pop(self, None)
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Give the parser what arrived, a piece at a time."""
        if self._timer is None and not self._in_message:
            self._expect(self.limits.head_seconds)
        for start in range(0, len(data), PIECE):
            if self._refused or self.transport.is_closing():
                return  # what a client that is cut off goes on sending
            self._piece = data[start : start + PIECE]
            self._took_body = False
            super().data_received(self._piece)
            if self._in_message and not self._took_body and not self._refused:
                self._empty_bytes += len(self._piece)
                self._check_empty_bytes()

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.limits.send_seconds, self._drop)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    # What the parser says

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._empty_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; those that come after the body are nobody's."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request exists; its body may follow."""
        if self._is_over_limits():
            self._refuse_head()
            raise Refused
        if self.parser.get_method() == b"CONNECT":
            self.send_400_response("")
            raise Refused
        if self.parser.should_upgrade():
            # The parser would leave the body to the protocol that is offered: see _unsupported_upgrade_warning.
            self._offered = True
            return
        self._in_head = False
        self._empty_bytes = 0
        probe = httptools.parse_url(self.url).path in PROBES
        self.app = _crowded if self._probes_only and not probe else self._app
        self._expect(self._body_seconds())
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        self._took_body = True
        self._empty_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The client owes nothing more."""
        if self._offered:
            return
        self._in_message = self._in_head = False
        self._stop_timer()
        self.owing.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The client owes the next head, or the rest of a body that was answered before its end."""
        if not self.pipeline:
            self.owing[self] = None
        super().on_response_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Take up none of the protocols that a head offers (RFC 9110, 7.8): read it again without the offer."""
        error = sys.exc_info()[1]
        assert isinstance(error, httptools.HttpParserUpgrade)
        self._offered = False
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in OFFERS]
        rest = self._piece[error.args[0] :]
        self.parser = httptools.HttpRequestParser(self)
        super().data_received(b"\r\n".join([*lines, b"", rest]))

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, "invalid_http", "what arrived is not HTTP/1.1, or not as it is written down")

    # Limits

    def _check_empty_bytes(self) -> None:
        if len(self.headers) > self.limits.headers or self._empty_bytes > self.limits.head_bytes:
            if self._in_head:
                self._refuse_head()
            else:
                self._refuse(
                    400, "invalid_http", "the body's chunks carry more beside the body than a head may"
                )

    def _body_seconds(self) -> float:
        """Return how long the body may take: an adapter's files take as long as their download would."""
        form = any(
            name == b"content-type" and value.startswith(b"multipart/") for name, value in self.headers
        )
        uploads = form and httptools.parse_url(self.url).path.startswith(b"/adapters")
        return self.limits.upload_seconds if uploads else self.limits.body_seconds

    def _is_over_limits(self) -> bool:
        """Return whether a head that is whole is over a limit, to the byte; before, pieces alone are counted."""
        first = len(self.parser.get_method()) + len(self.url) + len(b"  HTTP/1.1\r\n")
        size = (
            first
            + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
            + len(b"\r\n")
        )
        limits = self.limits
        return size > limits.head_bytes or len(self.headers) > limits.headers or len(self.url) > LONGEST_URL

    def _refuse_head(self) -> None:
        bytes_, count = self.limits.head_bytes, self.limits.headers
        if len(self.url) > LONGEST_URL:
            self._refuse(414, "uri_too_long", f"the path and its query are over {LONGEST_URL} bytes")
        elif len(self.headers) <= count and len(self.url) > bytes_ // 2:
            message = f"the request's head is over {bytes_} bytes, most of it the path and its query"
            self._refuse(414, "uri_too_long", message)
        else:
            message = f"the request's head is over {bytes_} bytes or {count} headers"
            self._refuse(431, "head_too_large", message)

    def _expect(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._late, seconds)

    @property
    def _answers_earlier(self) -> bool:
        """Whether a request before the one that arrives is being answered."""
        under_way = self.cycle is not None and not self.cycle.response_complete
        return bool(self.pipeline) or (self._in_head and under_way)

    def _late(self, seconds: float) -> None:
        if self._answers_earlier:
            self._expect(seconds)  # nobody reads on meanwhile
        elif self._in_message:
            what = "head" if self._in_head else "body"
            self._refuse(408, "request_timeout", f"the request's {what} took over {seconds:g} seconds")
        else:
            self._drop()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer, unless an answer has begun, and close as soon as the client does or LINGER_SECONDS are over."""
        if self._refused:
            return
        self._refused = True
        self._stop_timers()
        self._unset_keepalive_if_required()
        answering = (
            self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        )
        if answering or self._answers_earlier:
            self._drop()
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(_as_http(status, *_refusal(status, code, message)))
        self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self._drop)

    def _drop(self) -> None:
        self.connections.discard(self)
        self.owing.pop(self, None)
        self._stop_timers()
        self.transport.abort()

    def _stop_timers(self) -> None:
        self._stop_timer()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def bounded(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return the protocol of one server's connections, for uvicorn.Config's ``http``."""
    owing: dict[BoundedProtocol, None] = {}
    return type("Bounded", (BoundedProtocol,), {"limits": limits, "owing": owing})


def _refusal(status: int, code: str, message: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of an answer that no route gives."""
    identity = uuid4().hex
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error, "request_id": identity}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", identity.encode()),
        (b"connection", b"close"),
    ]
    return [*headers, (b"retry-after", b"1")] if status == 503 else headers, body


def _as_http(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
    lines += [b"%s: %s" % header for header in headers]
    return b"\r\n".join([*lines, b"", body])


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what is no probe on a connection beyond the limit."""
    headers, body = _refusal(503, *CROWDED)
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def http_config(app: ASGIApp, limits: ConnectionLimits, *, drain_seconds: float) -> uvicorn.Config:
    """Return how uvicorn is to serve ``app`` on sockets that it is given; it runs on the loop that calls it."""
    return uvicorn.Config(
        app,
        loop="none",
        http=bounded(limits),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # Callers are whom the socket names: a header that anybody can write makes nobody local.
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        backlog=4096,
    )
