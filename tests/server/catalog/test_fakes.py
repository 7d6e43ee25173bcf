"""The fakes themselves: a test that fails half-way must not hang while it is cleared up."""

import asyncio
from pathlib import Path

from tests.server.catalog.fakes import SECONDS, House


async def test_a_house_is_left_at_once_whatever_is_under_way_in_it(tmp_path: Path) -> None:
    house = House(tmp_path)
    old, _ = await house.catalog.register("a", house.source("one"))
    house.engine.start(old.id)
    await house.catalog.replace("a", house.source("two", 1))
    house.engine.adding.close()
    late = asyncio.create_task(house.catalog.register("b", "one"))
    await house.engine.adding.reached()
    async with asyncio.timeout(SECONDS):
        await house.leave()
    record, _ = await late
    assert house.engine.held.keys() == {2, record.id}, "the old version was given back, the late one is there"
