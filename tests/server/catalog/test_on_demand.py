"""Models that are looked for: once for many, not again for a while where there is nothing, and never for ever."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterNotFound
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.web import WebLimits
from manylora.server.catalog import on_demand
from manylora.server.catalog.on_demand import SECONDS_REMEMBERED, OnDemand, Resolver
from manylora.server.errors import AdapterUnavailable
from tests.adapters.making import write
from tests.server.catalog.fakes import SECONDS, House


class Counted(Resolver):
    """A resolver that says how often it was asked."""

    asked: list[str] = []  # noqa: RUF012  # one test at a time

    def offer(self, name: str) -> Offer:
        self.asked.append(name)
        return Resolver.offer(self, name)


class Shelf:
    """Where models are looked for, and a clock that a test sets."""

    def __init__(self, house: House, directory: Path, seconds: float = SECONDS) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.now = 0.0
        self.house = house
        resolver = Resolver.of(str(directory), WebLimits())
        Counted.asked.clear()
        self.demand = OnDemand(Counted(resolver.template, resolver.finding), seconds, lambda: self.now)

    async def ask(self, name: str) -> None:
        await self.demand.look_for(self.house.catalog, name)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


async def test_many_ask_and_it_is_looked_for_once(house: House, tmp_path: Path) -> None:
    shelf = Shelf(house, tmp_path / "shelf")
    write(shelf.directory / "team" / "one")
    await asyncio.gather(*(shelf.ask("team/one") for _ in range(20)))
    assert Counted.asked == ["team/one"]
    assert house.catalog.get("team/one").record.version == 1


async def test_what_is_nowhere_is_not_looked_for_again_at_once(house: House, tmp_path: Path) -> None:
    shelf = Shelf(house, tmp_path / "shelf")
    for _ in range(3):
        await shelf.ask("one")
    assert Counted.asked == ["one"]
    write(shelf.directory / "one")
    shelf.now = SECONDS_REMEMBERED + 1
    await shelf.ask("one")
    assert house.id_of("one") == 1
    (shelf.directory / "broken").mkdir()
    (shelf.directory / "broken" / "adapter_config.json").write_text("{}")
    for _ in range(3):
        with pytest.raises(AdapterUnavailable, match=r"adapter_model\.safetensors"):
            await shelf.ask("broken")
    assert Counted.asked.count("broken") == 1


async def test_each_request_gets_an_error_of_its_own(house: House, tmp_path: Path) -> None:
    shelf = Shelf(house, tmp_path / "shelf")
    (shelf.directory / "broken").mkdir()
    (shelf.directory / "broken" / "adapter_config.json").write_text("{}")
    at_once = await asyncio.gather(*(shelf.ask("broken") for _ in range(3)), return_exceptions=True)
    later = await asyncio.gather(*(shelf.ask("broken") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(each, AdapterUnavailable) for each in (*at_once, *later))
    assert len({id(each) for each in (*at_once, *later)}) == 6
    shelf.now = SECONDS_REMEMBERED
    await shelf.ask("other")
    assert set(shelf.demand._refusals) == {"other"}


async def test_each_name_is_remembered_for_a_while_of_its_own(house: House, tmp_path: Path) -> None:
    shelf = Shelf(house, tmp_path / "shelf")
    for shelf.now, name in ((0.0, "one"), (SECONDS_REMEMBERED - 1, "two"), (SECONDS_REMEMBERED, "two")):
        await shelf.ask(name)
    await shelf.ask("one")
    assert Counted.asked == ["one", "two", "one"]


async def test_a_request_waits_for_a_while_and_the_loading_goes_on(house: House, tmp_path: Path) -> None:
    shelf = Shelf(house, tmp_path / "shelf", seconds=0.0)
    write(shelf.directory / "one")
    house.engine.adding.close()
    with pytest.raises(AdapterUnavailable, match="try again"):
        await shelf.ask("one")
    house.engine.adding.open()
    await house.catalog.settled()
    assert house.id_of("one") == 1
    assert Counted.asked == ["one"]


async def test_a_flood_of_names_is_bounded(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "MOST_AT_ONCE", 2)
    monkeypatch.setattr(on_demand, "MOST_REMEMBERED", 5)
    shelf = Shelf(house, tmp_path / "shelf")
    asked = await asyncio.gather(*(shelf.ask(f"n{number}") for number in range(6)), return_exceptions=True)
    assert [type(each) for each in asked] == [type(None)] * 2 + [AdapterUnavailable] * 4
    for number in range(20):
        await shelf.ask(f"m{number}")
    assert len(shelf.demand._refusals) == 5


async def test_names_that_lead_elsewhere_are_nowhere(house: House, tmp_path: Path) -> None:
    shelf = Shelf(house, tmp_path / "shelf")
    write(tmp_path / "outside")
    (shelf.directory / "link").symlink_to(tmp_path / "outside")
    await shelf.ask("../outside")
    with pytest.raises(AdapterUnavailable, match="leads out"):
        await shelf.ask("link")
    assert house.catalog.list() == ()


@pytest.mark.parametrize(
    ("where", "name", "src"),
    [
        ("hf://org/{name}", "sql", "hf://org/sql"),
        ("hf://org", "sql", "hf://org/sql"),
        ("hf://{name}", "org/sql", "hf://org/sql"),
        ("hf://org/lora-{name}", "sql", "hf://org/lora-sql"),
        ("https://host/{name}.zip", "team/sql", "https://host/team/sql.zip"),
        ("s3://bucket/loras/", "sql", "s3://bucket/loras/sql"),
    ],
)
def test_places_are_told_with_the_name_in_them(where: str, name: str, src: str) -> None:
    offer = Resolver.of(where, WebLimits()).offer(name)
    assert str(offer) == src
    assert offer.source is not None
    assert offer.source.is_remote
    with pytest.raises(AdapterNotFound):
        Resolver.of("hf://org/{name}", WebLimits()).offer("a:b")


def test_a_directory_is_where_the_name_goes_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shelf").mkdir()
    for where, root in (("shelf", tmp_path / "shelf"), (".", tmp_path), ("/", Path("/"))):
        for spelled in (where, f"{where.rstrip('/')}/{{name}}"):
            assert Resolver.of(spelled, WebLimits()).finding.root == root


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nowhere", "no directory that is there"),
        ("{name}", "no directory that is there"),
        ("{here}/lora-{name}", "no directory that is there"),
        ("{here}/{name}/adapter", "no directory that is there"),
        ("{here}/{name}/{name}", "no directory that is there"),
        ("ftp://host/{name}", "no place of adapters; expected one as hf"),
        ("https://host/{name}/{name}", "no place of adapters"),
        ("https://{name}", "names no host"),
    ],
)
def test_settings_that_name_no_place_are_refused(tmp_path: Path, where: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Resolver.of(where.replace("{here}", str(tmp_path)), WebLimits())
