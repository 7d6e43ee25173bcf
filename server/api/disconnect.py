"""Waiting for work and for the client at the same time: who hangs up ends what was done for them."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed the connection before it had its answer. Nobody hears the status that this becomes."""


async def done_within(request: Request, task: "asyncio.Future[Result]", seconds: float | None = None) -> bool:
    """Wait for ``task``; return whether it is done after ``seconds`` (None: wait until it is).

    If the client goes away first, or this call is cancelled, the task is cancelled and has ended before
    ClientGone or CancelledError is raised.
    """
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not task.done():
            raise ClientGone
    except BaseException:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    return task.done()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Return what ``work`` does, or end it and raise ClientGone if the client goes away first."""
    task = asyncio.ensure_future(work)
    await done_within(request, task)
    return task.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
