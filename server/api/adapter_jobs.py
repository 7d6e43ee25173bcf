"""Registrations as jobs of the API: waited for, or begun and told of."""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TypeVar
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse

from manylora.adapters.errors import AdapterNameTaken
from manylora.adapters.names import LONGEST_ECHO
from manylora.adapters.sources.upload import SHOWN
from manylora.server.api.adapter_schemas import AdapterUpdate
from manylora.server.api.calling import current_caller
from manylora.server.api.disconnect import unless_gone
from manylora.server.api.error_responses import message_of, shape_of
from manylora.server.catalog import AdapterCatalog
from manylora.server.catalog.registrations import Registration

T = TypeVar("T")
Work = Callable[[Registration | None], Coroutine[object, object, T]]
"""Registers an adapter, as this registration if one is given."""


async def waited_for(request: Request, work: Work[T]) -> T:
    """Do it, unless the client leaves."""
    return await unless_gone(request, work(None))


async def begun(
    catalog: AdapterCatalog, name: str, src: str, asked: str, work: Work[T], held: AsyncExitStack
) -> JSONResponse:
    """Begin it and answer 202 with how far it is; ``held`` stays until it is over.

    The same (``asked``, see ``all_of``) again under a name is the same registration. Raises what is known at once:
    AdapterNameTaken while the name is being registered from elsewhere, what names are refused for, and QueueFull.
    """
    running = catalog.registrations.under_way(name)
    if running is not None and (running.src != src or src == SHOWN):
        raise AdapterNameTaken(
            f"{name[:LONGEST_ECHO]!r} is being registered from {running.src[:LONGEST_ECHO]!r}: wait for that, or DELETE"
            " it first"
        )
    running = catalog.registrations.same(name, asked)
    if running is None:
        caller = current_caller()
        tenant = "" if caller.sees_all else caller.tenant
        running = catalog.registrations.open(name, src, asked=asked, tenant=tenant)
        task = catalog.in_background(_holding(held.pop_all(), work(running)))
        # A name that can't be given is known before the work first waits for anything.
        await asyncio.sleep(0)
        if task.done():
            catalog.registrations.forget(name)
            await task
    return JSONResponse(
        describe_registration(running),
        status_code=202,
        headers={"location": f"/adapters/{quote(name, safe='/:')}"},
    )


def all_of(request: Request, body: AdapterUpdate) -> str:
    """Return a digest of all that a request asks for: the token in it isn't kept."""
    asked = repr((request.method, body.model_dump())).encode(errors="backslashreplace")
    return hashlib.sha256(asked).hexdigest()


async def ended(catalog: AdapterCatalog, name: str) -> Registration | None:
    """Have the registrations of a name end before they take effect, if they can; return the last one, or the failed."""
    found = catalog.registrations.cancel(name)
    for each in found:
        await each.over.wait()
    return found[-1] if found else catalog.registrations.forget(name)


def describe_registration(registration: Registration) -> dict[str, object]:
    """Return a registration as the routes show it."""
    done, total = registration.bytes
    error = registration.error if registration.state == "failed" else None
    return {
        "object": "adapter.registration",
        "name": registration.name,
        "src": registration.src,
        "state": registration.state,
        "progress": min(1.0, done / total) if total else None,
        "bytes": done,
        "total_bytes": total,
        "reason": None if error is None else message_of(error),
        "code": None if error is None else shape_of(error).code,
        "created": int(registration.created),
    }


async def _holding(held: AsyncExitStack, work: Coroutine[object, object, T]) -> T:
    async with held:
        return await work
