"""Slots are given out owner by owner, and none is lost with those who leave."""

import asyncio

from manylora.server.catalog.fair_slots import FairSlots


async def test_whoever_waits_has_its_turn_with_all_others() -> None:
    slots, order = FairSlots(1), list[str]()

    async def work(owner: str) -> None:
        async with slots.slot(owner):
            order.append(owner)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(owner) for owner in ["busy"] * 5 + ["one", "two", "one"]))
    assert order == ["busy", "busy", "one", "two", "busy", "one", "busy", "busy"]


async def test_a_slot_whose_taker_left_goes_to_the_next() -> None:
    slots, entered = FairSlots(1), asyncio.Event()

    async def hold() -> None:
        async with slots.slot("a"):
            entered.set()
            await asyncio.Event().wait()

    async def take() -> None:
        async with slots.slot("b"):
            pass

    holder = asyncio.create_task(hold())
    await entered.wait()
    leaving, staying = asyncio.create_task(take()), asyncio.create_task(take())
    await asyncio.sleep(0)
    leaving.cancel()
    holder.cancel()
    await asyncio.wait_for(staying, 5)
    # One that is told of its turn and cancelled in the same moment passes it on.
    holder = asyncio.create_task(hold())
    entered.clear()
    await entered.wait()
    leaving, staying = asyncio.create_task(take()), asyncio.create_task(take())
    await asyncio.sleep(0)
    holder.cancel()
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait_for(staying, 5)
    await asyncio.wait_for(take(), 5)


async def test_no_more_are_held_than_there_are_whoever_left() -> None:
    slots, held, most = FairSlots(2), 0, 0

    async def work() -> None:
        nonlocal held, most
        async with slots.slot("a"):
            held += 1
            most = max(most, held)
            await asyncio.sleep(0)
            held -= 1

    for _ in range(3):
        tasks = [asyncio.create_task(work()) for _ in range(6)]
        await asyncio.sleep(0)
        tasks[3].cancel()  # it waits
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert most == 2
