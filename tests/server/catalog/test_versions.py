"""Versions of a name: kept, asked for, gone back to, tried on a share of the requests, and let go."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from manylora.adapters.errors import (
    AdapterNameTaken,
    InvalidMixture,
    StoreFull,
    UnknownAdapter,
    UnknownVersion,
    VersionConflict,
)
from manylora.adapters.mixtures import MixturePart
from manylora.server.catalog import Quota
from manylora.server.errors import AdapterUnavailable, ModelNotFound, NamespaceFull
from tests.server.catalog.fakes import House

USERS = [f"user {number}" for number in range(400)]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    house.open(keep_versions=2)
    for seed in range(5):
        house.source(f"s{seed}", seed)
    yield house
    await house.leave()


async def put(house: House, *sources: int, name: str = "a") -> list[int]:
    """Put sources one after the other; return their ids."""
    return [(await house.catalog.put(name, f"s{source}")).record.id for source in sources]


def told(house: House, name: str = "a") -> dict[int, str]:
    return {entry.record.version: entry.record.state.value for entry in house.catalog.versions(name)}


async def restarted(house: House, keep: int = 2) -> None:
    await house.catalog.settled()
    house.kill()
    house.open(keep_versions=keep)
    await house.catalog.restore()


async def test_old_versions_are_kept_and_asked_for_by_number(house: House) -> None:
    ids = await put(house, 0, 1, 2, 3)
    await house.catalog.settled()
    assert told(house) == {4: "active", 3: "kept", 2: "kept"}
    assert house.id_of("a") == house.id_of("a@4") == ids[3]
    assert house.id_of("a@2") == ids[1]
    assert house.engine.held.keys() == set(ids[1:])
    for unknown in ("a@1", "a@99", "a@0", "a@02", "a@x"):
        with pytest.raises(ModelNotFound):
            house.catalog.resolve(unknown)
    with pytest.raises(ModelNotFound, match=r"model 'a@99' does not exist; versions of 'a': 4, 3, 2$"):
        house.catalog.resolve("a@99")
    with pytest.raises(UnknownVersion, match="versions: 4, 3, 2"):
        house.catalog.get("a@99")
    assert house.catalog.get("a@2").record.id == ids[1]
    assert house.catalog.resolve("a").answers == "a@4"
    assert house.catalog.resolve("a@2").label == "a"


async def test_a_kept_version_takes_no_memory_until_it_is_asked_for(house: House) -> None:
    [first] = [(await house.catalog.put("a", "s0", preload=True, pin=True)).record.id]
    house.engine.start(first)
    second = (await house.catalog.put("a", "s1")).record
    assert (second.pinned, second.preload) == (True, True)
    assert house.engine.adapter_tier(first) == "device", "a request is under way"
    assert not house.engine.held[first].pinned
    house.engine.finish(first)
    assert house.engine.adapter_tier(first) == "disk"
    assert house.engine.held[first].load_from().nbytes > 0


async def test_going_back_gives_the_name_its_old_id(house: House) -> None:
    ids = await put(house, 0, 1)
    await house.catalog.roll_back("a")
    assert house.id_of("a") == ids[0]
    assert told(house) == {2: "kept", 1: "active"}
    with pytest.raises(VersionConflict, match=r"no version to go back to.*kept are 2"):
        await house.catalog.roll_back("a")
    await house.catalog.roll_back("a", 2)
    assert house.id_of("a") == ids[1]
    assert (await put(house, 2))[0] > ids[1]
    assert told(house) == {3: "active", 2: "kept", 1: "kept"}, "versions go on counting"
    with pytest.raises(UnknownVersion, match="versions: 3, 2, 1"):
        await house.catalog.roll_back("a", 9)
    with pytest.raises(UnknownAdapter):
        await house.catalog.roll_back("b")


async def test_what_takes_over_is_kept_in_memory_as_what_it_takes_over_from(house: House) -> None:
    first = (await house.catalog.put("a", "s0")).record.id
    second = (await house.catalog.put("a", "s1", preload=True, pin=True)).record.id
    assert house.engine.adapter_tier(first) == "disk"
    await house.catalog.roll_back("a")
    assert house.engine.adapter_tier(first) == "device"
    assert house.engine.held[first].pinned
    assert (house.engine.adapter_tier(second), house.engine.held[second].pinned) == ("disk", False)
    record = house.catalog.get("a").record
    assert (record.pinned, record.preload) == (True, True)


async def test_going_back_does_not_fail_for_want_of_room(house: House) -> None:
    house.engine.room = 1
    first = (await house.catalog.put("a", "s0")).record.id
    await house.catalog.put("a", "s1", preload=True)
    await house.catalog.roll_back("a")
    assert house.id_of("a") == first
    assert ("failed preload", "a") in house.diary.events


async def test_a_registry_that_fails_leaves_what_was(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = await put(house, 0, 1)
    await house.catalog.put("a", "s1", pin=True)

    def full(*arguments: object) -> None:
        raise StoreFull("full")

    with monkeypatch.context() as patched:
        patched.setattr(house.registry, "change", full)
        for change in (
            house.catalog.roll_back("a"),
            house.catalog.try_version("a", 1, 0.5),
            house.catalog.forget_version("a", 1),
        ):
            with pytest.raises(StoreFull):
                await change
    assert house.id_of("a") == ids[1]
    assert told(house) == {2: "active", 1: "kept"}
    assert not house.engine.held[ids[0]].pinned
    assert house.engine.held[ids[1]].pinned


async def test_a_canary_gets_its_share_and_everybody_the_same_each_time(house: House) -> None:
    ids = await put(house, 0)
    assert await house.catalog.try_source("a", "s1", 0.25) is True
    canary = house.id_of("a@2")
    assert house.id_of("a") == ids[0], "who doesn't ask for anybody gets the active version"

    def versions() -> dict[str, int]:
        return {user: house.catalog.resolve("a", asker=user).adapters[0][0] for user in USERS}

    first = versions()
    assert versions() == first
    assert 50 < sum(each == canary for each in first.values()) < 150
    assert await house.catalog.try_source("a", "s1", 0.5) is False, "the same weights: another share"
    more = versions()
    assert all(more[user] == canary for user, each in first.items() if each == canary)
    await house.catalog.try_version("a", 2, 0)
    assert set(versions().values()) == {ids[0]}
    assert await house.catalog.try_source("a", "s2", 0) is True
    assert told(house) == {3: "canary", 2: "kept", 1: "active"}, "other weights are another canary"
    await house.catalog.try_version("a", 2, 1)
    assert set(versions().values()) == {canary}
    assert house.catalog.resolve("a", asker="x").answers == "a@2"
    assert house.catalog.resolve("a@1", asker="x").answers == "a@1", "a version asked for is that version"
    assert house.catalog.resolve("a:0.5", asker="x").answers == "a@1:0.5", "mixtures follow the active one"


async def test_a_canary_is_promoted(house: House) -> None:
    ids = await put(house, 0)
    await house.catalog.try_source("a", "s1", 0.25)
    await house.catalog.promote("a")
    assert told(house) == {2: "active", 1: "kept"}
    await house.catalog.roll_back("a")
    assert house.id_of("a") == ids[0]
    with pytest.raises(VersionConflict, match="has no canary"):
        await house.catalog.promote("a")


async def test_going_back_past_a_canary_ends_it(house: House) -> None:
    await put(house, 0, 1)
    await house.catalog.try_source("a", "s2", 0.25)
    await house.catalog.roll_back("a")
    assert told(house) == {3: "kept", 2: "active", 1: "kept"}
    await house.catalog.try_version("a", 3, 0.25)
    await house.catalog.abort_canary("a")
    assert told(house) == {3: "kept", 2: "active", 1: "kept"}
    with pytest.raises(VersionConflict, match="has no canary"):
        await house.catalog.abort_canary("a")


async def test_a_replacement_ends_the_canary(house: House) -> None:
    await put(house, 0)
    await house.catalog.try_source("a", "s1", 0.25)
    await put(house, 2)
    assert told(house) == {3: "active", 2: "kept", 1: "kept"}


async def test_what_can_not_be_a_canary(house: House) -> None:
    await put(house, 0)
    for change, error in (
        (house.catalog.try_version("a", 1, 0.5), VersionConflict),
        (house.catalog.try_version("a", 9, 0.5), UnknownVersion),
        (house.catalog.try_source("a", "s0", 0.5), VersionConflict),
        (house.catalog.try_source("b", "nowhere", 0.5), UnknownAdapter),
    ):
        with pytest.raises(error):
            await change
    assert told(house) == {1: "active"}


async def test_damaged_versions_are_neither_tried_nor_gone_back_to(house: House) -> None:
    await put(house, 0, 1, 2)
    await house.catalog.try_version("a", 2, 1.0)
    for version in (1, 2):
        house.store.remove(house.catalog.get(f"a@{version}").record.digest)
    await restarted(house)
    with pytest.raises(AdapterUnavailable, match="'a@1' can't be served"):
        house.catalog.resolve("a@1")
    for change in (
        house.catalog.roll_back("a", 1),
        house.catalog.try_version("a", 1, 0.5),
        house.catalog.promote("a"),
    ):
        with pytest.raises(AdapterUnavailable, match="can't be served"):
            await change
    assert told(house) == {3: "active", 2: "canary", 1: "kept"}
    assert house.catalog.resolve("a", asker="x").answers == "a@3", "a canary that can't answer gets nothing"
    await house.catalog.abort_canary("a")
    for version in (1, 2):
        await house.catalog.forget_version("a", version)
    assert told(house) == {3: "active"}


async def test_versions_and_canaries_are_there_again(house: House) -> None:
    ids = await put(house, 0, 1, 2)
    await house.catalog.roll_back("a")
    await house.catalog.try_version("a", 3, 0.25)
    before = house.catalog.versions("a")
    asked = {user: house.catalog.resolve("a", asker=user).adapters for user in USERS}
    await restarted(house)
    assert [each.record for each in house.catalog.versions("a")] == [each.record for each in before]
    assert {user: house.catalog.resolve("a", asker=user).adapters for user in USERS} == asked
    assert house.engine.adapter_tier(ids[0]) == "disk"
    await house.catalog.abort_canary("a")
    await house.catalog.roll_back("a")
    assert house.id_of("a") == ids[0]
    await restarted(house, keep=0)
    assert told(house) == {1: "active"}
    house.check()


async def test_a_version_is_let_go(house: House) -> None:
    ids = await put(house, 0, 1)
    house.engine.start(ids[0])
    await house.catalog.forget_version("a", 1)
    assert told(house) == {2: "active"}
    assert len(house.store.digests()) == 2, "a request still runs on it"
    house.engine.finish(ids[0])
    await house.catalog.settled()
    house.check()
    for version, error in ((1, UnknownVersion), (2, VersionConflict)):
        with pytest.raises(error):
            await house.catalog.forget_version("a", version)


async def test_deleting_a_name_ends_all_of_its_versions(house: House) -> None:
    ids = await put(house, 0, 1, 2)
    house.engine.start(ids[0])
    house.engine.start(ids[2])
    record, freed = await house.catalog.delete("a", abort=True)
    assert (record.id, freed.aborted) == (ids[2], 2)
    assert house.store.digests() == frozenset()
    assert (await house.catalog.put("a", "s0")).record.version == 4
    assert told(house) == {4: "active"}


async def test_versions_are_parts_of_mixtures(house: House) -> None:
    ids = await put(house, 0, 1)
    [other] = await put(house, 2, name="b")
    found = house.catalog.resolve("a@1:0.5+b+a:0.25")
    assert found.adapters == ((ids[0], 0.5), (ids[1], 0.25), (other, 1.0))
    assert found.answers == "a@1:0.5+b@1:1+a@2:0.25"
    assert house.catalog.resolve(found.answers).adapters == found.adapters
    with pytest.raises(InvalidMixture, match="'a' and 'a@2' are the same version"):
        house.catalog.resolve("a+a@2")
    with pytest.raises(ModelNotFound, match="part 'a@9' does not exist; versions of 'a': 2, 1"):
        house.catalog.resolve("a@9+b")
    await house.catalog.register_mixture("m", [MixturePart("a@1", 0.5), MixturePart("b", 1.0)])
    for name in ("m@1", "base@1"):
        with pytest.raises(ModelNotFound, match="is no adapter, and has no versions"):
            house.catalog.resolve(name)
    await put(house, 3, 4)
    with pytest.raises(AdapterUnavailable, match="part 'a@1' does not exist"):
        house.catalog.resolve("m")


async def test_a_name_of_a_mixture_has_no_versions_to_change(house: House) -> None:
    await put(house, 0)
    await house.catalog.register_mixture("m", [MixturePart("a", 0.5)])
    for change in (house.catalog.roll_back("m"), house.catalog.try_source("m", "s1", 0.5)):
        with pytest.raises(UnknownAdapter):
            await change
    with pytest.raises(AdapterNameTaken):
        await house.catalog.put("m", "s1")


async def test_two_changes_of_one_name_take_turns(house: House) -> None:
    ids = await put(house, 0)
    done = await asyncio.gather(
        house.catalog.put("a", "s1"),
        house.catalog.try_source("a", "s2", 0.5),
        house.catalog.roll_back("a"),
        house.catalog.put("a", "s3"),
        house.catalog.promote("a"),
        return_exceptions=True,
    )
    assert all(not isinstance(each, BaseException) or isinstance(each, VersionConflict) for each in done)
    await house.catalog.settled()
    house.check()
    assert house.engine.ever >= set(ids)


async def test_who_leaves_before_its_turn_came_changes_nothing(house: House) -> None:
    await put(house, 0, 1)
    house.engine.adding.close()
    replacing = asyncio.create_task(house.catalog.put("a", "s2"))
    await house.engine.adding.reached()
    leaving = asyncio.create_task(house.catalog.roll_back("a"))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    house.engine.adding.open()
    await replacing
    await house.catalog.settled()
    assert told(house) == {3: "active", 2: "kept", 1: "kept"}


async def test_whoever_may_use_one_version_sees_that_one(house: House) -> None:
    await put(house, 0, 1)
    seen = house.catalog.seen_by(lambda name, version: version in (None, 1))
    assert seen.resolve("a@1").answers == "a@1"
    for unknown in ("a", "a@2"):
        with pytest.raises(ModelNotFound):
            seen.resolve(unknown)
    await house.catalog.try_version("a", 1, 1.0)
    newest = house.catalog.seen_by(lambda name, version: version in (None, 2))
    assert newest.resolve("a", asker="x").answers == "a@2", "a canary that it may not use isn't there"


async def test_kept_versions_count_in_a_quota_and_give_way(house: House) -> None:
    (house.sources / "acme").mkdir()
    for seed in range(4):
        house.source(f"acme/s{seed}", seed)
    owner = house.catalog.managed_by(lambda name, version: True, Quota("acme"))
    await owner.put("acme/a", "s0")
    size = house.store.nbytes(house.catalog.get("acme/a").record.digest)
    room = house.catalog.managed_by(lambda name, version: True, Quota("acme", nbytes=2 * size + size // 2))
    for source in ("s1", "s2"):
        await room.put("acme/a", source)
    assert told(house, "acme/a") == {3: "active", 2: "kept"}, "a third doesn't find room"
    with pytest.raises(NamespaceFull, match="old versions"):
        await room.put("acme/b", "s3")
    await room.forget_version("acme/a", 2)
    await room.put("acme/b", "s3")
    with pytest.raises(NamespaceFull):
        await room.try_source("acme/b", "s0", 0.5)
    tight = house.catalog.managed_by(lambda name, version: True, Quota("acme", rows=10))
    with pytest.raises(NamespaceFull, match="rank rows"):
        await tight.try_source("acme/b", "s0", 0.5)


async def test_a_version_of_more_rows_answers_only_where_there_is_room(house: House) -> None:
    (house.sources / "acme").mkdir()
    house.source("acme/large", rank=8)
    house.source("acme/small", 1)
    owner = house.catalog.managed_by(lambda name, version: True, Quota("acme", rows=9))
    await owner.put("acme/a", "large")
    await owner.put("acme/a", "small")
    await owner.put("acme/b", "small")
    with pytest.raises(NamespaceFull, match="12 rank rows, at most 9"):
        await owner.roll_back("acme/a")
    with pytest.raises(NamespaceFull, match="16 rank rows, at most 9"):
        await owner.try_version("acme/a", 1, 0.1)
    assert told(house, "acme/a") == {2: "active", 1: "kept"}
    await owner.delete("acme/b")
    await owner.roll_back("acme/a")
    none = house.catalog.managed_by(lambda name, version: True, Quota("acme", rows=1))
    await none.roll_back("acme/a", 2)
    assert told(house, "acme/a") == {2: "active", 1: "kept"}, "fewer rows are never refused"
