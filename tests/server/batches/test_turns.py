"""Places that tenants have in turn."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from manylora.server.batches.turns import Turns


async def test_tenants_have_turns_however_many_wait_for_each() -> None:
    turns, order, inside = Turns(2), list[str](), 0

    async def line(owner: str) -> None:
        nonlocal inside
        async with turns.turn(owner):
            inside += 1
            assert inside <= 2
            order.append(owner)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(line("acme") for _ in range(100)), *(line("globex") for _ in range(5)))
    assert len(order) == 105
    assert order[:14].count("globex") == 5, "one of theirs after each of the other's, once both wait"
    await asyncio.wait_for(line("acme"), 5)


@pytest.mark.parametrize("given", [False, True])
async def test_who_goes_while_he_waits_takes_no_place_with_him(given: bool) -> None:
    turns = Turns(1)

    async def pass_through() -> None:
        async with turns.turn("globex"):
            pass

    async with AsyncExitStack() as held:
        await held.enter_async_context(turns.turn("acme"))
        waiting = asyncio.create_task(pass_through())
        await asyncio.sleep(0)
        if given:
            await held.aclose()  # he has the place, and hasn't gone on
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
    await asyncio.wait_for(pass_through(), 5)
