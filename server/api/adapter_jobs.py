"""Registrations as jobs of the API: waited for, or begun and told of."""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import JSONResponse

from manylora.adapters.errors import AdapterNameTaken
from manylora.adapters.names import LONGEST_ECHO
from manylora.adapters.sources.upload import SHOWN
from manylora.server.api.adapter_schemas import Offered
from manylora.server.api.adapter_uploads import Asked
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
    request: Request,
    catalog: AdapterCatalog,
    name: str,
    asked: Asked[Any],
    work: Work[T],
    *,
    share: float | None = None,
) -> JSONResponse:
    """Begin it and answer 202 with how far it is; what is uploaded stays until it is over. ``share``: as a canary.

    The same again under a name is the same registration. Raises what is known at once: AdapterNameTaken while the
    name is being registered from elsewhere, what names are refused for, and QueueFull.
    """
    src, wished = str(asked.offer), _all_of(request, asked.body)
    running = catalog.registrations.under_way(name)
    if running is not None and (running.src != src or src == SHOWN):
        raise AdapterNameTaken(
            f"{name[:LONGEST_ECHO]!r} is being registered from {running.src[:LONGEST_ECHO]!r}: wait for that, or DELETE"
            " it first"
        )
    running = catalog.registrations.same(name, wished)
    if running is None:
        caller = current_caller()
        tenant = "" if caller.sees_all else caller.tenant
        running = catalog.registrations.open(name, src, asked=wished, tenant=tenant, share=share)
        task = catalog.in_background(_holding(asked.held.pop_all(), work(running)))
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


def _all_of(request: Request, body: Offered) -> str:
    """Return a digest of all that a request asks for: the token in it isn't kept."""
    asked = repr((request.method, body.model_dump())).encode(errors="backslashreplace")
    return hashlib.sha256(asked).hexdigest()


async def ended(catalog: AdapterCatalog, name: str) -> Registration | None:
    """Have the registrations of a name end before they take effect, if they can; return the last one, or the failed."""
    return await _over(catalog.registrations.cancel(name)) or catalog.registrations.forget(name)


async def trials_ended(catalog: AdapterCatalog, name: str) -> Registration | None:
    """Have the registrations of canaries of a name end before they take effect, as ``ended`` does with all."""
    registrations = catalog.registrations
    over = await _over(registrations.cancel_trials(name))
    last = registrations.of(name)
    if over is None and last is not None and last.is_trial and last.state == "failed":
        return registrations.forget(name)
    return over


async def _over(found: list[Registration]) -> Registration | None:
    """Wait until they have ended; return the last one."""
    for each in found:
        await each.over.wait()
    return found[-1] if found else None


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
        "share": registration.share,
        "created": int(registration.created),
    }


async def _holding(held: AsyncExitStack, work: Coroutine[object, object, T]) -> T:
    async with held:
        return await work
