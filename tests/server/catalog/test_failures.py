"""The catalog when things go wrong: faults, full disks, callers that leave, crashes, damaged files, races."""

import asyncio
import contextlib
import errno
import os
import random
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora.adapters.errors import AdapterNameTaken, RegistryBusy, StoreFull, UnknownAdapter
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.reserve import Reserve
from manylora.adapters.sources.local import LocalSource
from manylora.server.errors import AdapterUnavailable, ModelNotFound
from tests.server.catalog.fakes import FakeEngine, House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


async def leave(task: asyncio.Task[object]) -> None:
    """The client hangs up."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_fault_of_the_engine_undoes_a_registration(house: House) -> None:
    house.engine.fault = AdapterUnavailable("no room")
    with pytest.raises(AdapterUnavailable):
        await house.catalog.register("a", house.source("one"))
    with pytest.raises(ModelNotFound):
        house.catalog.resolve("a")
    house.check()
    house.engine.fault = None
    record, created = await house.catalog.register("a", "one")
    assert created
    assert record.id == 2, "an id that failed is not used again"


async def test_a_fault_of_the_engine_leaves_the_old_version(house: House) -> None:
    old, _ = await house.catalog.register("a", house.source("one"))
    house.engine.fault = RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        await house.catalog.replace("a", house.source("two", 1))
    assert house.catalog.get("a").record == old
    house.check()


@pytest.mark.parametrize("call", ["reserve", "activate"])
async def test_a_fault_of_the_registry_undoes_all(
    house: House, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    old, _ = await house.catalog.register("a", house.source("one"))

    def locked(*_args: object, **_more: object) -> None:
        raise RegistryBusy("locked")

    monkeypatch.setattr(AdapterRegistry, call, locked)
    with pytest.raises(RegistryBusy):
        await house.catalog.replace("a", house.source("two", 1))
    with pytest.raises(RegistryBusy):
        await house.catalog.register("b", "two")
    monkeypatch.undo()
    assert house.catalog.get("a").record == old
    house.check()


async def test_a_locked_registry_leaves_an_adapter_that_was_to_be_deleted(house: House) -> None:
    record, _ = await house.catalog.register("a", house.source("one"))
    other = sqlite3.connect(house.root / "adapters.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RegistryBusy):
        await house.catalog.delete("a")
    other.execute("ROLLBACK")
    other.close()
    assert house.catalog.resolve("a").adapters == ((record.id, 1.0),)


async def test_an_adapter_answers_until_the_registry_has_let_it_go(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, _ = await house.catalog.register("a", house.source("one"))
    waiting, go_on = threading.Event(), threading.Event()

    def locked(*_args: object) -> None:
        waiting.set()
        go_on.wait(30)
        raise RegistryBusy("locked")

    monkeypatch.setattr(AdapterRegistry, "retire", locked)
    deleting = asyncio.create_task(house.catalog.delete("a"))
    await asyncio.to_thread(waiting.wait, 30)
    assert house.catalog.resolve("a").adapters == ((record.id, 1.0),), (
        "it was hidden while the registry was locked"
    )
    go_on.set()
    with pytest.raises(RegistryBusy):
        await deleting
    assert house.catalog.resolve("a").adapters == ((record.id, 1.0),)


class FullDisk(Reserve):
    """A disk that the adapters' files fill: a record changes only while the reserve is given up."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "reserve")
        self.database, self.store = root / "adapters.db", root / "store"
        self.is_full = False

    def hold(self) -> None:
        if not self.is_full or len(list(self.store.iterdir())) < self.files:
            super().hold()  # an adapter's files have gone, and left room for it
        if self.is_full:
            self.fill()  # and the disk is as full as before

    def fill(self) -> None:
        self.is_full, self.files = True, len(list(self.store.iterdir()))
        self._execute(
            "CREATE TRIGGER IF NOT EXISTS full BEFORE UPDATE ON adapters"
            " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )

    def give_up(self) -> bool:
        held = super().give_up()
        if held and self.is_full:
            self._execute("DROP TRIGGER full")
        return held

    def _execute(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self.database, isolation_level=None)) as connection:
            connection.execute(statement)


async def test_on_a_full_disk_one_adapter_after_the_other_can_be_deleted(house: House) -> None:
    await house.catalog.close()
    disk = FullDisk(house.root)
    house.open(reserve=disk)
    for seed, name in enumerate("abcd"):
        await house.catalog.register(name, house.source(name, seed))
    disk.fill()
    for name in "abcd":
        await house.catalog.delete(name)
    assert house.store.digests() == frozenset()


async def test_a_full_disk_leaves_all_as_it_was(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = await house.catalog.register("a", house.source("one"))

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull):
        await house.catalog.replace("a", house.source("two", 1))
    with pytest.raises(StoreFull):
        await house.catalog.register("b", "two")
    monkeypatch.undo()
    assert house.catalog.get("a").record == old
    house.check()


async def test_a_caller_that_leaves_while_the_engine_adds(house: House) -> None:
    house.engine.adding.close()
    task = asyncio.create_task(house.catalog.register("a", house.source("one")))
    await house.engine.adding.reached()
    await leave(task)
    house.engine.adding.open()
    await house.catalog.settled()
    assert house.catalog.list() == ()
    house.check()


async def test_a_caller_that_leaves_a_replacement(house: House) -> None:
    old, _ = await house.catalog.register("a", house.source("one"))
    house.engine.adding.close()
    task = asyncio.create_task(house.catalog.replace("a", house.source("two", 1)))
    await house.engine.adding.reached()
    await leave(task)
    house.engine.adding.open()
    await house.catalog.settled()
    assert house.catalog.get("a").record == old


async def test_one_of_two_callers_leaves_and_the_other_is_served(house: House) -> None:
    src = house.source("one")
    house.engine.adding.close()
    first = asyncio.create_task(house.catalog.register("a", src))
    await house.engine.adding.reached()
    second = asyncio.create_task(house.catalog.register("a", src))
    await leave(first)
    house.engine.adding.open()
    record, created = await second
    assert created
    assert house.catalog.resolve("a").adapters == ((record.id, 1.0),)


async def test_a_caller_that_leaves_a_deletion_does_not_stop_it(house: House) -> None:
    record, _ = await house.catalog.register("a", house.source("one"))
    house.engine.removing.close()
    task = asyncio.create_task(house.catalog.delete("a"))
    await house.engine.removing.reached()
    await leave(task)
    house.engine.removing.open()
    await house.catalog.settled()
    assert record.id not in house.engine.held
    assert house.store.digests() == frozenset()


@pytest.mark.parametrize("ticks", range(0, 60, 4))
async def test_leaving_at_any_moment_leaves_all_or_nothing(house: House, ticks: int) -> None:
    await house.catalog.register("a", house.source("one"))
    tasks = [
        asyncio.create_task(house.catalog.replace("a", house.source("two", 1))),
        asyncio.create_task(house.catalog.register("b", house.source("three", 2))),
    ]
    for _ in range(ticks):
        await asyncio.to_thread(int)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await house.catalog.settled()
    house.check()
    assert house.catalog.get("a").record.version in (1, 2)


async def test_a_crash_between_the_steps_leaves_the_last_whole_state(house: House) -> None:
    kept, _ = await house.catalog.register("a", house.source("one"))
    house.source("two", 1)
    published = house.store.publish(house.store.stage(LocalSource(house.sources / "two")))
    house.registry.reserve("a", published.name, source="two", rank=4, targets=("q_proj",))
    house.store.stage(LocalSource(house.sources / "two"))
    house.kill()
    house.open()
    report = await house.catalog.restore()
    assert (report.restored, report.swept) == (1, 2)
    assert house.catalog.get("a").record == kept


async def test_damaged_and_missing_files_do_not_stop_the_start(house: House) -> None:
    records = {}
    for seed, name in enumerate(("good", "gone", "cut", "rotten")):
        records[name], _ = await house.catalog.register(
            name, house.source(name, seed), preload=name == "rotten"
        )
    await house.catalog.close()
    weights = {
        name: house.store.path_of(record.digest) / "adapter_model.safetensors"
        for name, record in records.items()
    }
    house.store.remove(records["gone"].digest)
    os.truncate(weights["cut"], 1000)
    whole = bytearray(weights["rotten"].read_bytes())
    whole[-1] ^= 1
    weights["rotten"].write_bytes(whole)

    house.open()
    report = await house.catalog.restore()
    assert report.restored == 1
    assert sorted(report.unavailable) == ["cut", "gone", "rotten"]
    assert "truncated" in report.unavailable["cut"]
    for name in report.unavailable:
        with pytest.raises(AdapterUnavailable, match="can't be served"):
            house.catalog.resolve(name)
        assert house.catalog.get(name).tier is None
    with pytest.raises(AdapterNameTaken):
        await house.catalog.register("gone", "good")

    healed, created = await house.catalog.register("gone", "gone")
    assert (healed.id, created) == (records["gone"].id, False)
    assert house.id_of("gone") == healed.id
    assert (await house.catalog.replace("cut", "cut")).id == records["cut"].id
    _, freed = await house.catalog.delete("rotten")
    assert freed.host_bytes == 0


async def test_files_that_rot_while_serving_are_a_clear_error(house: House) -> None:
    record, _ = await house.catalog.register("a", house.source("one"))
    weights = house.store.path_of(record.digest) / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(AdapterUnavailable, match="'a' can't be served"):
        house.engine.held[record.id].load_from()
    weights.write_bytes(content)


@pytest.mark.parametrize("call", ["register", "put", "replace"])
@pytest.mark.parametrize("verified", [True, False])
async def test_the_same_weights_again_heal_damaged_files(house: House, call: str, verified: bool) -> None:
    record, _ = await house.catalog.register("a", house.source("one"))
    if not verified:
        await house.catalog.close()
        house.open()
        await house.catalog.restore()
    house.engine.evict(record.id)
    weights = house.store.path_of(record.digest) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(AdapterUnavailable, match="register the adapter again"):
        house.engine.held[record.id].load_from()
    await getattr(house.catalog, call)("a", "one")
    assert house.catalog.get("a").record == record
    assert house.engine.held[record.id].load_from().nbytes > 0
    assert (house.store.path_of(record.digest) / "adapter_model.safetensors").read_bytes() == whole


async def test_files_that_could_not_be_read_are_not_called_whole(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails changes no times: what was hashed once would pass for whole for ever."""
    record, _ = await house.catalog.register("a", house.source("one"))

    def fail(*_args: object, **_more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("manylora.server.catalog.intake.read_adapter", fail)
    with pytest.raises(AdapterUnavailable, match="Input/output error"):
        house.engine.held[record.id].load_from()
    monkeypatch.undo()
    hashed: list[int] = []
    read = os.read

    def counted(handle: int, nbytes: int) -> bytes:
        hashed.append(handle)
        return read(handle, nbytes)

    monkeypatch.setattr(os, "read", counted)
    assert house.store.is_intact(record.digest)
    assert hashed
    hashed.clear()
    assert house.store.is_intact(record.digest)
    assert not hashed


async def test_a_source_that_changes_while_another_prepares_it_is_read_anew(house: House) -> None:
    house.engine.adding.close()
    first = asyncio.create_task(house.catalog.register("a", house.source("one")))
    await house.engine.adding.reached()
    house.source("one", 7)
    house.engine.adding.open()
    second, _ = await house.catalog.register("b", "one")
    assert (await first)[0].digest != second.digest


async def test_a_failed_retirement_is_reported_and_keeps_the_files(house: House) -> None:
    old, _ = await house.catalog.register("a", house.source("one"))
    held = house.engine.held.pop(old.id)
    await house.catalog.replace("a", house.source("two", 1))
    await house.catalog.settled()
    assert ("failed retire", "a") in house.diary.events
    assert house.store.path_of(old.digest).is_dir()
    assert held.weights is not None
    house.store.remove(old.digest)


NAMES, SOURCES = ("a", "b"), ("one", "two", "three")
STEPS = st.tuples(
    st.sampled_from(["register", "replace", "delete", "abort"]),
    st.sampled_from(NAMES),
    st.sampled_from(SOURCES),
    st.booleans(),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=12), seed=st.integers(0, 1000))
def test_any_interleaving_leaves_catalog_engine_registry_and_store_in_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str, bool]], seed: int
) -> None:
    asyncio.run(interleave(tmp_path_factory.mktemp("house"), steps, random.Random(seed)))


async def interleave(root: Path, steps: list[tuple[str, str, str, bool]], rng: random.Random) -> None:
    house = House(root)
    for number, name in enumerate(SOURCES):
        house.source(name, number)
    tasks: list[asyncio.Task[None]] = []
    for kind, name, src, leaves in steps:
        task = asyncio.create_task(one_step(house, kind, name, src))
        tasks.append(task)
        for _ in range(rng.randrange(4)):
            await asyncio.to_thread(int)
        if leaves:
            task.cancel()
        with contextlib.suppress(ModelNotFound):
            adapter_id = house.id_of(name)
            assert adapter_id in house.engine.held, "whatever resolves can be served"
    await asyncio.gather(*tasks, return_exceptions=True)
    await house.catalog.settled()
    house.check()
    await house.catalog.close()
    await check_restart(house)


async def one_step(house: House, kind: str, name: str, src: str) -> None:
    with contextlib.suppress(UnknownAdapter, AdapterNameTaken):
        if kind == "register":
            await house.catalog.register(name, src)
        elif kind == "replace":
            await house.catalog.replace(name, src)
        else:
            await house.catalog.delete(name, abort=kind == "abort")


async def check_restart(house: House) -> None:
    before = [entry.record for entry in house.catalog.list()]
    house.open(FakeEngine())
    report = await house.catalog.restore()
    assert [entry.record for entry in house.catalog.list()] == before
    assert report.swept == 0
    house.check()
    await house.catalog.close()
