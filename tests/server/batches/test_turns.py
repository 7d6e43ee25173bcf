"""Places that tenants have in turn."""

import asyncio

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
    turns, leave = Turns(1), asyncio.Event()

    async def hold() -> None:
        async with turns.turn("acme"):
            await leave.wait()

    async def pass_through() -> None:
        async with turns.turn("globex"):
            pass

    holder, waiting = asyncio.create_task(hold()), asyncio.create_task(pass_through())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if given:
        leave.set()
        await holder
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    leave.set()
    await holder
    await asyncio.wait_for(pass_through(), 5)
