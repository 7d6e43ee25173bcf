"""A directory that is followed: folders come, change and go, half-written ones wait, and nobody else's are touched."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from manylora.adapters.errors import RegistryBusy, StoreFull
from manylora.server.catalog.catalog import Src
from manylora.server.catalog.types import PutOutcome
from manylora.server.catalog.watch import Watch
from manylora.server.errors import ShuttingDown
from tests.adapters.making import factors, write
from tests.server.catalog.fakes import SECONDS, House


class Followed:
    """A watched directory, and what was said of it."""

    def __init__(self, house: House, directory: Path, **more: bool) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.said: list[tuple[str, str]] = []
        self.watch = Watch(
            house.catalog, directory, lambda name, error: self.said.append((name, str(error))), **more
        )
        self.house = house

    async def look(self, times: int = 2) -> dict[str, int]:
        """Look so often; return what is served, with versions."""
        for _ in range(times):
            await self.watch.look()
        await self.house.catalog.settled()
        return {each.record.name: each.record.version for each in self.house.catalog.list()}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


@pytest.fixture
def followed(house: House, tmp_path: Path) -> Followed:
    return Followed(house, tmp_path / "watched")


async def test_folders_come_change_and_go(house: House, followed: Followed) -> None:
    write(followed.directory / "one")
    assert await followed.look(1) == {}  # it may still be being written
    assert await followed.look(1) == {"one": 1}
    assert await followed.look() == {"one": 1}
    write(followed.directory / "one", tensors=factors(1))
    write(followed.directory / "two", tensors=factors(2))
    assert await followed.look(1) == {"one": 1}
    assert await followed.look(1) == {"one": 2, "two": 1}
    (followed.directory / "one").rename(followed.directory / "three")
    assert await followed.look(1) == {"one": 2, "two": 1}
    assert await followed.look() == {"three": 1, "two": 1}
    assert followed.said == []


async def test_what_is_half_there_waits(house: House, followed: Followed) -> None:
    folder = followed.directory / "one"
    write(folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    assert await followed.look() == {}
    assert [name for name, _ in followed.said] == ["one"]  # once, however often it is looked at
    assert await followed.look() == {}
    assert len(followed.said) == 1
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert await followed.look() == {"one": 1}
    (folder / "adapter_model.safetensors").write_bytes(weights[:-8])
    assert await followed.look() == {"one": 1}
    assert len(followed.said) == 2


async def test_what_came_in_another_way_stays(house: House, followed: Followed, tmp_path: Path) -> None:
    await house.catalog.register("one", house.source("one"))
    write(followed.directory / "one", tensors=factors(1))
    write(followed.directory / "base", tensors=factors(1))
    write(followed.directory / "no name", tensors=factors(1))
    assert await followed.look() == {"one": 1}
    assert {name for name, _ in followed.said} == {"one", "base", "no name"}
    assert house.catalog.get("one").record.source == "one"


async def test_nothing_is_deleted_when_nothing_can_be_seen(house: House, followed: Followed) -> None:
    write(followed.directory / "one")
    await followed.look()
    away = followed.directory.rename(followed.directory.with_name("unmounted"))
    assert await followed.look(3) == {"one": 1}
    assert len(followed.said) == 1
    away.rename(followed.directory)
    assert await followed.look() == {"one": 1}
    followed.directory.rename(away)
    assert await followed.look() == {"one": 1}
    assert len(followed.said) == 2, "it could be seen meanwhile"
    missing = Followed(house, followed.directory.with_name("another"))
    missing.directory.rmdir()
    await missing.look()
    assert len(missing.said) == 1


async def test_a_deletion_that_fails_is_told_of_and_tried_again(
    house: House, followed: Followed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(name: str) -> None:
        raise RegistryBusy("locked")

    write(followed.directory / "one")
    await followed.look()
    (followed.directory / "one").rename(tmp_path / "away")
    with monkeypatch.context() as patched:
        patched.setattr(house.catalog, "delete", busy)
        assert await followed.look() == {"one": 1}
    assert followed.said == [("one", "locked")]
    assert await followed.look(1) == {}


async def test_folders_that_go_may_leave_their_adapters(house: House, tmp_path: Path) -> None:
    followed = Followed(house, tmp_path / "watched", keep_removed=True)
    write(followed.directory / "one")
    await followed.look()
    (followed.directory / "one").rename(tmp_path / "elsewhere")
    assert await followed.look(3) == {"one": 1}
    # Without the rule they go, also after a restart.
    house.kill()
    house.open()
    await house.catalog.restore()
    assert await Followed(house, tmp_path / "watched").look(2) == {}


async def test_weights_that_were_gone_back_from_stay_kept(house: House, tmp_path: Path) -> None:
    house.kill()
    house.open(keep_versions=4)
    followed = Followed(house, tmp_path / "watched")
    folder = followed.directory / "one"
    write(folder)
    await followed.look()
    write(folder, tensors=factors(1))
    assert await followed.look() == {"one": 2}
    await house.catalog.roll_back("one")
    for restart in (False, True):
        if restart:
            house.kill()
            house.open(keep_versions=4)
            await house.catalog.restore()
            followed = Followed(house, tmp_path / "watched")
        else:
            os.utime(folder / "adapter_config.json", (1, 1))
        await house.catalog.try_version("one", 2, 0.5)
        assert await followed.look(3) == {"one": 1}
        assert [each.record.state.value for each in house.catalog.versions("one")] == ["canary", "active"]
    # What comes into the folder then is new, also if it was there before.
    write(folder, tensors=factors(2))
    assert await followed.look() == {"one": 3}
    write(folder)
    assert await followed.look() == {"one": 4}
    assert followed.said == []


async def test_a_folder_that_fails_holds_up_no_other(
    house: House, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = house.catalog.put

    async def failing(name: str, src: Src, **more: bool | None) -> PutOutcome:
        if name == "one":
            raise OSError(errno.EIO, "Input/output error")
        return await put(name, src, **more)

    for name in ("one", "two"):
        write(followed.directory / name)
    monkeypatch.setattr(house.catalog, "put", failing)
    assert await followed.look(4) == {"two": 1}
    assert [name for name, _ in followed.said] == ["one"]
    monkeypatch.undo()
    assert await followed.look(1) == {"one": 1, "two": 1}


async def test_what_is_hidden_or_no_folder_is_passed_over(followed: Followed) -> None:
    write(followed.directory / ".one")
    (followed.directory / "empty").mkdir()
    (followed.directory / "README.md").write_text("what is in here")
    assert await followed.look(3) == {}
    assert followed.said == []


async def test_a_folder_that_comes_back_as_it_was_is_served_again(followed: Followed, tmp_path: Path) -> None:
    write(followed.directory / "one")
    await followed.look()
    away = (followed.directory / "one").rename(tmp_path / "away")
    assert await followed.look() == {}
    for _ in range(2):
        away.rename(followed.directory / "one")
        assert (await followed.look()).keys() == {"one"}
        (followed.directory / "one").rename(away)
        assert await followed.look() == {}


async def test_what_finds_no_room_is_tried_again_though_its_files_are_the_same(
    house: House, followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(name: str, src: Src, **more: bool | None) -> PutOutcome:
        raise StoreFull("no space is left")

    write(followed.directory / "one")
    with monkeypatch.context() as patched:
        patched.setattr(house.catalog, "put", full)
        assert await followed.look(3) == {}
    assert followed.said == [("one", "no space is left")] * 2
    assert await followed.look(1) == {"one": 1}


async def test_it_looks_on_after_a_fault_says_each_once_and_ends_with_the_server(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("the disk is strange")
    looks: list[Exception | None] = [fault, fault, None, fault, ShuttingDown("it is over")]

    async def look() -> None:
        error = looks.pop(0)
        if error is not None:
            raise error

    monkeypatch.setattr(followed.watch, "look", look)
    await asyncio.wait_for(followed.watch.run(0.0), SECONDS)
    assert not looks
    assert followed.said == [(str(followed.directory), str(fault))] * 2, "again once it was better meanwhile"
