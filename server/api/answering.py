"""From what is asked for to its answer: the road that every route takes which has the model generate."""

import asyncio
from collections.abc import Callable

from fastapi import Request
from fastapi.responses import Response

from manylora.server.api.asked_models import with_parts
from manylora.server.api.asks import Ask
from manylora.server.api.dependencies import dependencies
from manylora.server.api.disconnect import done_within, unless_gone
from manylora.server.api.generation import Generation, begin, usage_of
from manylora.server.api.rendering import json_response
from manylora.server.api.streaming import event_stream
from manylora.server.api.writer import Form, Writer


async def respond(request: Request, ask: Ask, form_of: Callable[[Generation], Form]) -> Response:
    """Answer what is asked for, as one object or as a stream. Raises what is wrong with it, and ClientGone."""
    deps = dependencies(request)
    generation = await unless_gone(request, begin(deps, ask))
    form = form_of(generation)
    if ask.stream:
        writer = Writer(generation, form)
        return with_parts(
            await event_stream(request, writer, deps.settings.keep_alive_seconds), generation.model
        )
    collecting = asyncio.ensure_future(generation.collect())
    await done_within(request, collecting)
    choices = collecting.result()
    usage = usage_of(choices, ask.n)
    rests = deps.rests if form.large else None
    whole = await json_response(lambda: form.whole(choices, usage, at_once=rests is None), rests)
    return with_parts(whole, generation.model)
