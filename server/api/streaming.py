"""Server-sent events: one per step and choice, a usage event if asked, then [DONE].

What fails before the response has begun is answered with its status. After that it is one event with the error's
envelope, and the stream ends without [DONE]. The response begins with the first event, or when so much time has
passed that the client must hear a keep-alive.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import Request
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from structlog import get_logger

from manylora.server.api.disconnect import done_within
from manylora.server.api.error_responses import envelope, shape_of
from manylora.server.api.rendering import dumps
from manylora.server.api.request_context import note

log = get_logger(__name__)
Events = AsyncGenerator[str, None]
"""JSON texts. Closing it ends what makes them."""
DONE = "[DONE]"

# Streams drain at shutdown as every other request does; sse-starlette would cut them off at the first signal.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # it ships none


async def event_stream(request: Request, events: Events, keep_alive: float) -> EventSourceResponse:
    """Return the response that sends ``events``, with a comment whenever ``keep_alive`` seconds were silent.

    Raises what fails before the response begins, and ClientGone.
    """
    head = asyncio.ensure_future(anext(events))
    if await done_within(request, head, keep_alive):
        head.result()  # raises what went wrong
    return EventSourceResponse(
        _sent(head, events),
        ping=keep_alive,
        ping_message_factory=_keep_alive,
        sep="\n",
        # Proxies must not hold events back.
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _sent(head: "asyncio.Future[str]", events: Events) -> AsyncIterator[ServerSentEvent]:
    try:
        yield _event(await head)
        async for event in events:
            yield _event(event)
        yield _event(DONE)
    except (asyncio.CancelledError, GeneratorExit):
        note(reason="the client hung up")
        raise
    except Exception as error:
        if shape_of(error).code == "internal_error":
            log.error("unexpected error in a stream", exc_info=error)
        yield _event(dumps(envelope(error)))
    finally:
        await events.aclose()


def _event(data: str) -> ServerSentEvent:
    return ServerSentEvent(data=data, sep="\n")


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")
