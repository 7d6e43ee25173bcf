"""Server-sent events: what a step brought, rendered (writer.py) and sent in one write.

From the engine's outputs to the socket there is one coroutine: it takes what has come, has it rendered and sends it in
one write. What fails before the response has begun is answered with its status. After that it is one event with the
error's envelope, and the stream ends without [DONE]. The response begins with the first event, or when so much time has
passed that the client must hear a keep-alive.
"""

import asyncio

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send
from structlog import get_logger

from manylora.server.api.disconnect import ClientGone, done_within
from manylora.server.api.error_responses import envelope, shape_of
from manylora.server.api.request_context import note
from manylora.server.api.writer import Writer

log = get_logger(__name__)
KEEP_ALIVE = b": keep-alive\n\n"


async def event_stream(request: Request, writer: Writer, keep_alive: float) -> Response:
    """Return the response that sends an answer's events, with a comment whenever ``keep_alive`` seconds were silent.

    Raises what fails before the response begins, and ClientGone.
    """
    feed = _Feed(writer, keep_alive)
    head = asyncio.ensure_future(feed.next())
    try:
        if await done_within(request, head, keep_alive):
            head.result()  # raises what went wrong
    except BaseException:
        feed.close()
        raise
    return _EventStream(head, feed)


class _Feed:
    """The bytes that are to be sent, as they come."""

    def __init__(self, writer: Writer, keep_alive: float) -> None:
        self._generation = writer.generation
        self.writer = writer
        self._keep_alive = keep_alive
        self._gone = self._done = False
        self._said = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def next(self) -> bytes:
        """Return what is to be sent next; nothing: that was all. Raises ClientGone, and what ended the answer."""
        while not self._done:
            outputs = await self._generation.take()
            if self._gone:
                raise ClientGone
            if outputs is None:
                return KEEP_ALIVE
            if not outputs:
                self._done = True
                return self.writer.last()
            data = await self.writer.of(outputs)
            if data:
                return data
        return b""

    def begin(self) -> None:
        """Say something whenever it has been silent, from now on."""
        loop = asyncio.get_running_loop()
        self._said = loop.time()
        # The head may have waited for as long already.
        self._timer = loop.call_later(self._keep_alive, self._look)

    def said(self) -> None:
        """Note that something was sent."""
        self._said = asyncio.get_running_loop().time()

    def client_left(self) -> None:
        """Let ``next`` raise ClientGone."""
        self._gone = True
        self._generation.stream.nudge()

    def close(self) -> None:
        """Free what the engine still holds."""
        if self._timer is not None:
            self._timer.cancel()
        self._generation.abort()
        self.writer.note()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        silent = loop.time() - self._said
        if silent >= self._keep_alive:
            self._said, silent = loop.time(), 0.0
            self._generation.stream.nudge()
        self._timer = loop.call_later(self._keep_alive - silent, self._look)


class _EventStream(Response):
    """A response whose body comes piece by piece, for as long as its client listens."""

    media_type = "text/event-stream"

    def __init__(self, head: "asyncio.Future[bytes]", feed: _Feed) -> None:
        self.status_code = 200
        self.background = None
        self._head = head
        self._feed = feed
        # Proxies must not hold events back.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        feed = self._feed
        listening = asyncio.ensure_future(_until_gone(receive))
        listening.add_done_callback(lambda _: feed.client_left())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            feed.begin()
            await self._send_events(send)
        except (asyncio.CancelledError, ClientGone) as gone:
            note(reason="the client hung up")
            if isinstance(gone, asyncio.CancelledError):
                raise
        finally:
            self._head.cancel()
            listening.cancel()
            feed.close()

    async def _send_events(self, send: Send) -> None:
        feed = self._feed
        try:
            data = await self._head
            while data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                feed.said()
                data = await feed.next()
        except ClientGone:
            raise
        except Exception as error:
            if shape_of(error).code == "internal_error":
                log.error("unexpected error in a stream", exc_info=error)
            data = feed.writer.failed(envelope(error))
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
