"""The catalog's life cycle: register, resolve, replace, delete, restart; all in order, nothing failing."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from manylora.adapters.errors import (
    AdapterError,
    AdapterNameTaken,
    AdapterNotFound,
    AdapterPathForbidden,
    InvalidAdapter,
    UnknownAdapter,
)
from manylora.adapters.reader import LoadedAdapter, read_adapter
from manylora.adapters.sources.local import LocalSource
from manylora.adapters.store import AdapterStore, StagedAdapter
from manylora.adapters.types import BaseModules
from manylora.server.errors import AdapterUnavailable, ModelNotFound, ShuttingDown
from tests.adapters.making import factors, write
from tests.adapters.putting import put
from tests.server.catalog.fakes import FakeEngine, House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


async def test_register_and_resolve(house: House) -> None:
    record, created = await house.catalog.register(
        "a", house.source("one", template="T"), preload=True, pin=True
    )
    assert created
    resolved = house.catalog.resolve("a")
    assert (resolved.adapters, resolved.name, resolved.chat_template) == (((record.id, 1.0),), "a", "T")
    assert house.catalog.resolve("base").adapters == ()
    entry = house.catalog.get("a")
    assert (entry.tier, entry.record.rank, entry.record.version) == ("device", 4, 1)
    assert house.engine.held[record.id].pinned
    assert house.diary.events == [("loaded", "a")]


async def test_the_same_weights_again_are_the_same_id(house: House) -> None:
    src = house.source("one")
    first, _ = await house.catalog.register("a", src)
    assert await house.catalog.register("a", house.source("copy")) == (first, False)
    with pytest.raises(AdapterNameTaken):
        await house.catalog.register("a", house.source("two", 1))
    assert house.engine.added == 1


@pytest.mark.parametrize("call", ["register", "replace", "put"])
async def test_the_same_weights_again_are_kept_as_is_asked(house: House, call: str) -> None:
    src = house.source("one")
    first, _ = await house.catalog.register("a", src)
    assert (first.preload, first.pinned, house.catalog.get("a").tier) == (False, False, "host")
    again = getattr(house.catalog, call)
    await again("a", src, preload=True, pin=True)
    entry = house.catalog.get("a")
    assert (entry.record.preload, entry.record.pinned, entry.tier) == (True, True, "device")
    assert house.engine.held[first.id].pinned
    await again("a", src)
    assert house.catalog.get("a") == entry, "what is not said stays"
    await again("a", src, pin=False)
    assert not house.engine.held[first.id].pinned
    assert (entry.record.id, house.engine.added) == (first.id, 1)
    await house.catalog.close()
    house.open()
    await house.catalog.restore()
    assert house.catalog.get("a").tier == "device", "a restart knows it too"


async def test_a_wish_that_finds_no_room_changes_nothing(house: House) -> None:
    await house.catalog.register("a", house.source("one"), preload=True)
    second, _ = await house.catalog.register("b", house.source("two", 1))
    house.engine.evict(second.id)
    house.engine.room = 1
    with pytest.raises(AdapterUnavailable):
        await house.catalog.register("b", "two", preload=True, pin=True)
    assert house.catalog.get("b").record == second
    assert not house.engine.held[second.id].pinned


async def test_put_adds_or_replaces(house: House) -> None:
    one, two = house.source("one"), house.source("two", 1)
    first = await house.catalog.put("a", one)
    assert (first.is_new, first.replaced, first.record.version) == (True, None, 1)
    again = await house.catalog.put("a", one)
    assert (again.is_new, again.replaced, again.record) == (False, None, first.record)
    second = await house.catalog.put("a", two)
    assert (second.is_new, second.replaced, second.record.version) == (True, first.record, 2)
    await house.catalog.settled()
    assert house.store.digests() == {second.record.digest}
    with pytest.raises(InvalidAdapter):
        await house.catalog.put("base", one)


async def test_puts_and_deletes_of_one_name_take_effect_one_after_the_other(house: House) -> None:
    sources = [house.source(f"s{seed}", seed) for seed in range(5)]
    puts = [house.catalog.put("a", sources[number % 5]) for number in range(20)]
    deletes = [house.catalog.delete("a") for _ in range(3)]
    results = await asyncio.gather(*puts, *deletes, return_exceptions=True)
    assert not [each for each in results[:20] if isinstance(each, BaseException)]
    assert {type(each) for each in results[20:]} <= {tuple, UnknownAdapter}
    last = await house.catalog.put("a", sources[0])
    assert house.catalog.get("a").record == last.record


async def test_an_unknown_model_lists_those_that_exist(house: House) -> None:
    src = house.source("one")
    for number in range(22):
        await house.catalog.register(f"a{number:02}", src)
    with pytest.raises(ModelNotFound, match=r"a00, .*a19 and 3 more") as caught:
        house.catalog.resolve("x" * 10_000)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 500
    with pytest.raises(UnknownAdapter):
        house.catalog.get("x")


async def test_fifty_at_once_are_one_copy_one_read_one_id(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[object] = []
    reads: list[Path] = []
    stage = AdapterStore.stage

    def counted_stage(store: AdapterStore, *arguments: Any) -> StagedAdapter:
        copies.append(arguments)
        return stage(store, *arguments)

    def counted_read(directory: Path, modules: BaseModules, **more: Any) -> LoadedAdapter:
        reads.append(directory)
        return read_adapter(directory, modules, **more)

    monkeypatch.setattr(AdapterStore, "stage", counted_stage)
    monkeypatch.setattr("manylora.server.catalog.intake.read_adapter", counted_read)
    src = house.source("one")
    answers = await asyncio.gather(*(house.catalog.register("a", src) for _ in range(50)))
    assert len({record.id for record, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert (len(copies), len(reads), house.engine.added) == (1, 1, 1)


async def test_one_directory_under_many_names_at_once(house: House) -> None:
    src = house.source("one")
    answers = await asyncio.gather(*(house.catalog.register(f"a{i}", src) for i in range(20)))
    assert len({record.id for record, _ in answers}) == 20
    assert len(house.store.digests()) == 1


async def test_names_that_share_files_keep_them(house: House) -> None:
    src = house.source("one")
    first, _ = await house.catalog.register("a", src)
    second, _ = await house.catalog.register("b", src)
    assert first.digest == second.digest
    await house.catalog.delete("a")
    assert house.store.path_of(first.digest).is_dir()
    house.engine.evict(second.id)
    assert house.engine.held[second.id].load_from().nbytes > 0
    await house.catalog.delete("b")
    assert house.store.digests() == frozenset()


async def test_a_replacement_serves_new_requests_and_running_ones_end_on_the_old(house: House) -> None:
    old, _ = await house.catalog.register("a", house.source("one"), pin=True)
    house.engine.start(old.id)
    house.engine.evict(old.id)
    new = await house.catalog.replace("a", house.source("two", 1))
    assert (new.version, new.pinned) == (2, True)
    assert house.id_of("a") == new.id != old.id
    assert house.engine.held[old.id].load_from().nbytes > 0, "a preempted sequence may need the old files"
    assert house.store.path_of(old.digest).is_dir()
    house.engine.finish(old.id)
    await house.catalog.settled()
    assert old.id not in house.engine.held
    with pytest.raises(AdapterNotFound):
        house.store.path_of(old.digest)
    assert house.diary.events == [("loaded", "a"), ("swapped", f"{old.id}>{new.id}"), ("removed", "a")]


async def test_the_old_version_answers_until_the_new_one_is_ready(house: House) -> None:
    old, _ = await house.catalog.register("a", house.source("one"))
    house.engine.adding.close()
    change = asyncio.create_task(house.catalog.replace("a", house.source("two", 1)))
    await house.engine.adding.reached()
    assert house.id_of("a") == old.id
    house.engine.adding.open()
    new = await change
    assert house.id_of("a") == new.id != old.id


async def test_replacing_back_and_forth(house: House) -> None:
    one, two = house.source("one"), house.source("two", 1)
    first, _ = await house.catalog.register("a", one)
    house.engine.start(first.id)
    await house.catalog.replace("a", two)
    third = await house.catalog.replace("a", one)
    assert (third.version, third.digest) == (3, first.digest)
    house.engine.finish(first.id)
    await house.catalog.settled()
    assert house.store.digests() == {third.digest}
    assert await house.catalog.replace("a", one) == third
    with pytest.raises(UnknownAdapter):
        await house.catalog.replace("b", one)


async def test_delete_refuses_new_requests_waits_and_says_what_it_freed(house: House) -> None:
    record, _ = await house.catalog.register("a", house.source("one"), preload=True)
    nbytes = (house.engine.held[record.id].weights or pytest.fail("no weights")).nbytes
    house.engine.start(record.id)
    house.engine.removing.close()
    deleting = asyncio.create_task(house.catalog.delete("a"))
    await house.engine.removing.reached()
    with pytest.raises(ModelNotFound):
        house.catalog.resolve("a")
    again, created = await house.catalog.register("a", house.source("one"))
    assert created
    assert again.id != record.id
    house.engine.removing.open()
    house.engine.finish(record.id)
    gone, freed = await deleting
    assert gone.id == record.id
    assert (freed.device_bytes, freed.host_bytes, freed.aborted) == (nbytes, nbytes, 0)
    assert house.store.path_of(record.digest).is_dir()


async def test_delete_can_abort(house: House) -> None:
    record, _ = await house.catalog.register("a", house.source("one"))
    house.engine.start(record.id)
    _, freed = await house.catalog.delete("a", abort=True)
    assert freed.aborted == 1
    with pytest.raises(UnknownAdapter):
        await house.catalog.delete("a")


async def test_a_restart_reads_nothing_that_is_not_asked_for(house: House) -> None:
    kept = [
        (await house.catalog.register(name, house.source(name, seed)))[0] for seed, name in enumerate("abc")
    ]
    hot, _ = await house.catalog.register("hot", house.source("d", 9, template="T"), preload=True)
    old_ids = {record.id for record in (*kept, hot)}
    await house.catalog.close()
    house.open()
    report = await house.catalog.restore()
    assert (report.restored, report.unavailable, report.swept) == (4, {}, 0)
    assert (house.engine.added, house.engine.added_cold) == (1, 3)
    assert {entry.record.name: entry.tier for entry in house.catalog.list()} == {
        "a": "disk",
        "b": "disk",
        "c": "disk",
        "hot": "device",
    }
    assert house.catalog.resolve("hot").chat_template == "T"
    assert house.engine.held[kept[0].id].load_from().nbytes > 0
    fresh, _ = await house.catalog.register("e", house.source("e", 5))
    assert fresh.id not in old_ids


async def test_the_engine_knows_an_activated_adapter_s_invocation_from_the_start_and_after_a_restart(
    house: House,
) -> None:
    source = house.source("judge")
    write(house.sources / "judge", changes={"alora_invocation_tokens": [3, 4]})
    record, _ = await house.catalog.register("judge", source)
    assert house.engine.held[record.id].invocation == (3, 4)
    await house.catalog.close()
    house.open()
    await house.catalog.restore()
    assert (house.engine.added_cold, house.engine.held[record.id].invocation) == (1, (3, 4))
    assert house.engine.held[record.id].load_from().invocation == (3, 4)


async def test_a_thousand_adapters(house: House) -> None:
    template = house.source("one")
    house.store.publish(house.store.stage(LocalSource(house.sources / template)))
    (digest,) = house.store.digests()
    for number in range(1000):
        put(house.registry, f"a{number:03}", digest, source=template)
    report = await house.catalog.restore()
    assert report.restored == house.engine.added_cold == 1000
    assert len(house.catalog.list()) == 1000
    assert house.id_of("a999") == 1000


async def test_closing_refuses_changes(house: House) -> None:
    src = house.source("one")
    await house.catalog.close()
    with pytest.raises(ShuttingDown):
        await house.catalog.register("a", src)
    house.open()


@pytest.mark.parametrize(
    ("src", "kind"),
    [("nowhere", AdapterNotFound), ("../outside", AdapterPathForbidden), ("broken", InvalidAdapter)],
)
async def test_what_is_refused_leaves_nothing(house: House, src: str, kind: type[AdapterError]) -> None:
    write(house.sources / "broken", tensors=dict(list(factors().items())[1:]))
    with pytest.raises(kind):
        await house.catalog.register("a", src)
    assert house.catalog.list() == ()


async def test_the_operator_s_own_directory_may_lie_anywhere_and_hold_links(house: House) -> None:
    named = house.root / "cache" / "snapshots" / "0123"
    blobs = write(house.root / "cache" / "blobs", 5)
    named.mkdir(parents=True)
    for path in blobs.iterdir():
        (named / path.name).symlink_to(f"../../blobs/{path.name}")
    with pytest.raises(AdapterPathForbidden):
        await house.catalog.register("a", str(named))
    await house.catalog.close()
    house.open(trusted=named)
    record, created = await house.catalog.register("a", str(named))
    assert created
    assert record.source == str(named)


@pytest.mark.parametrize("name", ["base", "/a", "a b", ""])
async def test_bad_names(house: House, name: str) -> None:
    with pytest.raises(InvalidAdapter):
        await house.catalog.register(name, house.source("one"))


async def test_no_room_to_preload_at_restart_is_served_from_disk(house: House) -> None:
    for seed, name in enumerate("ab"):
        await house.catalog.register(name, house.source(name, seed), preload=True)
    await house.catalog.close()
    house.open(FakeEngine(room=1))
    report = await house.catalog.restore()
    assert report.restored == 2
    assert [entry.tier for entry in house.catalog.list()] == ["device", "disk"]
    assert ("failed preload", "b") in house.diary.events
    with pytest.raises(AdapterUnavailable):
        await house.catalog.register("c", house.source("c", 3), preload=True)


async def test_files_stay_while_a_running_old_version_has_them(house: House) -> None:
    src = house.source("one")
    old, _ = await house.catalog.register("a", src)
    await house.catalog.register("b", src)
    house.engine.start(old.id)
    await house.catalog.replace("a", house.source("two", 1))
    await house.catalog.delete("b")
    house.engine.evict(old.id)
    assert house.engine.held[old.id].load_from().nbytes > 0
    house.engine.finish(old.id)


async def test_files_stay_while_a_registration_with_them_is_under_way(house: House) -> None:
    src = house.source("one")
    await house.catalog.register("a", src)
    house.engine.adding.close()
    second = asyncio.create_task(house.catalog.register("b", src))
    await house.engine.adding.reached()
    await house.catalog.delete("a")
    house.engine.adding.open()
    record, _ = await second
    assert house.store.path_of(record.digest).is_dir()
