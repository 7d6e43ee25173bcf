"""Loads give way to requests that run, unless another request waits for what is loaded."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from manylora.adapters.sources.web import WebLimits
from manylora.server.catalog import intake
from manylora.server.catalog.on_demand import OnDemand, Resolver
from tests.adapters.making import write
from tests.server.catalog.fakes import SECONDS, House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    house.open(is_busy=lambda: True)
    yield house
    await house.leave()


@pytest.fixture
def rested(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list of what each spell was told when it asked whether anybody is in its way."""
    told: list[bool] = []

    class Told:
        def __init__(self, in_its_way: Callable[[], bool]) -> None:
            self._in_its_way = in_its_way

        def __call__(self) -> None:
            told.append(self._in_its_way())

    monkeypatch.setattr(intake, "Rests", Told)
    return told


async def test_a_load_that_nobody_waits_for_rests_between_its_pieces(
    house: House, rested: list[bool]
) -> None:
    await house.catalog.register("a", house.source("one"))
    copied_and_read = len(rested)
    # One chunk of each of the two files, and two modules.
    assert copied_and_read >= 4
    await house.catalog.put("a", house.source("one"))
    assert len(rested) == copied_and_read + 2  # it was hashed
    assert all(rested)


async def test_nobody_rests_where_no_request_runs(house: House, rested: list[bool]) -> None:
    house.kill()
    house.open(is_busy=lambda: False)
    await house.catalog.register("a", house.source("one"))
    assert rested
    assert not any(rested)


async def test_nobody_rests_while_a_request_waits_for_a_load(
    house: House, tmp_path: Path, rested: list[bool]
) -> None:
    shelf = tmp_path / "shelf"
    write(shelf / "one")
    resolver = Resolver.of(str(shelf), WebLimits())
    await OnDemand(resolver, SECONDS).look_for(house.catalog, "one")
    assert rested
    assert not any(rested)
    rested.clear()
    await house.catalog.register("a", house.source("two"))  # and again, once it doesn't
    assert rested
    assert all(rested)
