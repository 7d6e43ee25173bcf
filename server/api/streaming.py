"""Server-sent events: one per step and choice, a usage event if asked, then [DONE].

A fault after the first byte is one event with the error's envelope, and the stream ends without [DONE].
"""

import json
from collections.abc import AsyncIterator

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from structlog import get_logger

from server.api.error_responses import envelope, shape_of

log = get_logger(__name__)
DONE = "[DONE]"

# Streams drain at shutdown as every other request does; sse-starlette would cut them off at the first signal.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # it ships none


def dumps(value: object) -> str:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def first_event(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Wait for the first event, so that what fails before it is answered with a status, not in a stream."""
    head = await anext(events)

    async def whole() -> AsyncIterator[str]:
        try:
            yield head
            async for event in events:
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # a generator has it

    return whole()


def event_stream(events: AsyncIterator[str], keep_alive: float) -> EventSourceResponse:
    """Return the response that sends ``events``, each a JSON text."""

    async def guarded() -> AsyncIterator[ServerSentEvent]:
        try:
            async for event in events:
                yield ServerSentEvent(data=event, sep="\n")
            yield ServerSentEvent(data=DONE, sep="\n")
        except Exception as error:
            if shape_of(error).code == "internal_error":
                log.error("unexpected error in a stream", exc_info=error)
            yield ServerSentEvent(data=dumps(envelope(error)), sep="\n")
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # a generator has it

    # Proxies must not hold events back.
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return EventSourceResponse(guarded(), ping=max(1, round(keep_alive)), sep="\n", headers=headers)
