"""The catalog where two things meet: a deletion of files and their return, a shutdown and work under way."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.store import AdapterStore, StagedAdapter
from tests.server.catalog.fakes import SECONDS, House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


async def some_turns() -> None:
    """Let everything happen that waits for nothing but the loop and threads."""
    for _ in range(20):
        await asyncio.to_thread(lambda: None)


async def test_files_that_are_being_deleted_when_they_are_registered_again_are_there(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, published = threading.Event(), threading.Event()
    publish, remove = AdapterStore.publish, AdapterStore.remove

    def slowly(store: AdapterStore, digest: str) -> None:
        begun.set()
        published.wait(1.0)  # it must not be, but is given the time
        remove(store, digest)

    def noted(store: AdapterStore, staged: StagedAdapter) -> Path:
        path = publish(store, staged)
        published.set()
        return path

    await house.catalog.register("a", house.source("one"))
    monkeypatch.setattr(AdapterStore, "remove", slowly)
    monkeypatch.setattr(AdapterStore, "publish", noted)
    deleting = asyncio.create_task(house.catalog.delete("a"))
    assert await asyncio.to_thread(begun.wait, SECONDS)
    await house.catalog.register("b", "one")
    await deleting
    await house.catalog.settled()
    house.check()


async def test_the_registry_is_open_until_what_is_under_way_has_ended(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, close = threading.Event(), AdapterRegistry.close

    def noted(registry: AdapterRegistry) -> None:
        closed.set()
        close(registry)

    monkeypatch.setattr(AdapterRegistry, "close", noted)
    house.engine.adding.close()
    registering = asyncio.create_task(house.catalog.register("a", house.source("one")))
    await house.engine.adding.reached()
    closing = asyncio.create_task(house.catalog.close())
    await some_turns()
    assert not closed.is_set()
    house.engine.adding.open()
    await registering
    await closing
    assert closed.is_set()


async def test_a_reason_names_no_path_of_this_machine(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.catalog.register("a", house.source("one"))
    await house.catalog.settled()
    house.kill()
    house.open()

    def unreadable(store: AdapterStore, digest: str) -> Path:
        raise OSError(5, "Input/output error", "/secret/place")

    monkeypatch.setattr(AdapterStore, "path_of", unreadable)
    report = await house.catalog.restore()
    monkeypatch.undo()
    assert report.unavailable == {"a": "its files can't be read: Input/output error"}
