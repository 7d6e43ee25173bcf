"""The registry: one active record per name, ids that never come back, and errors that say what is wrong."""

import contextlib
import errno
import io
import os
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import event

from manylora.adapters.errors import (
    AdapterError,
    InvalidAdapter,
    RegistryBusy,
    RegistryFault,
    StoreFull,
    UnknownAdapter,
    VersionConflict,
)
from manylora.adapters.lineage import Lineage
from manylora.adapters.names import check_name, list_names
from manylora.adapters.records import AdapterRecord, AdapterState
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.reserve import Reserve
from tests.adapters.putting import put


@pytest.mark.parametrize("page", range(1, 4))
def test_a_damaged_page_is_told_when_the_registry_is_opened(path: Path, page: int) -> None:
    with AdapterRegistry(path) as registry:
        for number in range(40):
            put(registry, f"adapter-{number}", f"d{number}")
    with path.open("r+b") as file:
        file.seek(4096 * page)
        file.write(b"\xaa" * 3000)
    with pytest.raises(RegistryFault, match=r"damaged|malformed"):
        AdapterRegistry(path)


def test_what_is_put_is_active(registry: AdapterRegistry) -> None:
    first = put(registry, "a")
    assert (first.id, first.version, first.state) == (1, 1, AdapterState.ACTIVE)
    assert first.targets == ("q_proj", "v_proj")
    assert registry.active() == [first]
    assert registry.lineages() == [Lineage((first,))]


def test_a_replacement_is_a_new_id_and_version(registry: AdapterRegistry) -> None:
    put(registry, "a")
    second = put(registry, "a", "d2")
    assert (second.id, second.version) == (2, 2)
    assert registry.active() == [replace(second, before=None)]
    assert registry.digests_in_use() == {"d2"}


def test_ids_are_never_used_again(registry: AdapterRegistry, path: Path) -> None:
    registry.retire(put(registry, "a").name)
    pending = registry.reserve("b", "d", source="s", rank=1, targets=())
    registry.abandon(pending.id)
    registry.close()
    with AdapterRegistry(path) as again:
        assert (put(again, "a").id, again.active()[0].version) == (3, 2)


def test_a_pending_record_is_seen_by_nobody_but_keeps_its_files(registry: AdapterRegistry) -> None:
    put(registry, "a")
    pending = registry.reserve("a", "d2", source="s", rank=1, targets=())
    assert registry.active()[0].digest == "d1"
    assert registry.digests_in_use() == {"d1", "d2"}
    assert registry.activate(pending).active.version == 2
    assert registry.active()[0].digest == "d2"
    registry.reserve("b", "d3", source="s", rank=1, targets=())
    assert registry.drop_pending() == 1
    assert registry.digests_in_use() == {"d2"}


def test_unknown_names_list_the_known_ones(registry: AdapterRegistry) -> None:
    for number in range(25):
        put(registry, f"a{number:02}")
    with pytest.raises(UnknownAdapter, match=r"a00, .*a19 and 5 more"):
        registry.change("x", Lineage.aborted)
    with pytest.raises(UnknownAdapter):
        registry.retire("x")
    assert list_names([]) == "none"


@pytest.mark.parametrize(
    "name", ["", "a" * 129, "ä", "a b", "/a", "a/", "a//b", "../a", "a/..", ".", "a\n", "base", "a\\b"]
)
def test_bad_names_are_refused(registry: AdapterRegistry, name: str) -> None:
    with pytest.raises(InvalidAdapter, match="name"):
        put(registry, name)
    assert registry.active() == []


@pytest.mark.parametrize("name", ["a", "A.b_c-d/e:f", "team/v1.0", "..a", "a" * 128])
def test_good_names_pass(name: str) -> None:
    check_name(name, reserved=["base"])


def test_a_locked_database_is_a_clear_error(path: Path) -> None:
    with AdapterRegistry(path, lock_wait_ms=10) as registry:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RegistryBusy, match="locked"):
            put(registry, "a")
        other.execute("ROLLBACK")
        other.close()
        put(registry, "a")


def test_a_full_database_is_a_clear_error_and_changes_nothing(registry: AdapterRegistry) -> None:
    put(registry, "a")
    with registry._database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFull, match="full"):
        put(registry, "b", source="x" * 100_000)
    assert [record.name for record in registry.active()] == ["a"]


class FullDisk(Reserve):
    """A disk on which nothing can be written, until the reserve is given up."""

    def __init__(self, database: Path) -> None:
        super().__init__(database.with_name("reserve"))
        self._database = database

    def fill(self) -> None:
        self._execute(
            "CREATE TRIGGER full BEFORE UPDATE ON adapters"
            " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )

    def give_up(self) -> bool:
        held = super().give_up()
        if held:
            self._execute("DROP TRIGGER full")
        return held

    def _execute(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self._database, isolation_level=None)) as connection:
            connection.execute(statement)


def test_deleting_works_on_a_full_disk(path: Path) -> None:
    disk = FullDisk(path)
    with AdapterRegistry(path, reserve=disk) as registry:
        for name in ("a", "b"):
            put(registry, name)
        disk.fill()
        with pytest.raises(StoreFull):
            put(registry, "a", "d2")
        assert registry.retire("a").state is AdapterState.RETIRED
        assert path.with_name("reserve").stat().st_size == 128 << 10, "held again for the next time"
        assert path.with_name(f"{path.name}-wal").stat().st_size == 0, "what the log took came back with it"


def test_a_reserve_holds_what_it_can_get_and_the_rest_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that the database took for good must not cost all of it."""
    room = 5 * 4096
    real = io.FileIO.write

    class NearlyFull(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(self, data)

    reserve = Reserve(tmp_path / "reserve")
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: NearlyFull(path, mode))
    reserve.hold()
    assert (tmp_path / "reserve").stat().st_size == room
    room = 1 << 20
    reserve.hold()
    reserve.hold()
    assert (tmp_path / "reserve").stat().st_size == 128 << 10
    assert reserve.give_up()
    assert not reserve.give_up()


def test_a_new_version_and_the_end_of_the_old_one_are_one_transaction(path: Path) -> None:
    """Between two transactions a crash would leave a name without any version."""
    seen: list[str] = []
    with AdapterRegistry(path) as registry:
        put(registry, "a")
        pending = registry.reserve("a", "d2", source="s", rank=1, targets=())
        other = sqlite3.connect(path)

        @event.listens_for(registry._database.engine, "commit")
        def _before_commit(_connection: object) -> None:
            rows = other.execute("SELECT digest FROM adapters WHERE name = 'a' AND state = 'active'")
            seen.extend(digest for (digest,) in rows)

        registry.activate(pending)
        assert seen == ["d1"], "one commit, and until then the old version"
        assert other.execute("SELECT digest FROM adapters WHERE state = 'active'").fetchall() == [("d2",)]
        other.close()


def test_an_activation_that_fails_in_the_middle_leaves_the_old_version(path: Path) -> None:
    with AdapterRegistry(path) as registry:
        first = put(registry, "a")
        pending = registry.reserve("a", "d2", source="s", rank=1, targets=())
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(
                "CREATE TRIGGER fails BEFORE UPDATE ON adapters WHEN NEW.state = 'active'"
                " BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
            )
        with pytest.raises(AdapterError):
            registry.activate(pending)
        assert registry.active() == [first]


def test_a_disk_that_stays_full_is_a_clear_error(path: Path) -> None:
    disk = FullDisk(path)
    with AdapterRegistry(path, reserve=disk) as registry:
        put(registry, "a")
        path.with_name("reserve").unlink()
        disk.fill()
        with pytest.raises(StoreFull):
            registry.retire("a")
        assert [record.name for record in registry.active()] == ["a"]


def test_a_reserve_that_finds_no_space_is_no_error(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "missing" / "reserve")
    reserve.hold()
    assert not reserve.give_up()


def test_a_file_that_is_no_database(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(RegistryFault, match="can't be used"):
        AdapterRegistry(path)


def test_a_thousand_rows(registry: AdapterRegistry) -> None:
    for number in range(1000):
        put(registry, f"a{number}", f"d{number}")
    assert len(registry.active()) == 1000
    assert {record.name: record.digest for record in registry.active()}["a999"] == "d999"


class RegistryModel(RuleBasedStateMachine):
    """Any order of operations against dictionaries."""

    names = st.sampled_from(["a", "b", "c"])
    digests = st.sampled_from(["d1", "d2", "d3"])
    keeps = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        # In memory for speed; what is kept for a full disk needs a disk.
        self.registry = AdapterRegistry(
            Path(":memory:"), reserve=Reserve(Path(self.directory.name) / "reserve", 1)
        )
        self.there: dict[str, Lineage] = {}
        self.ids: set[int] = set()
        self.versions: dict[str, int] = {}

    @rule(name=names, digest=digests, keep=keeps, share=st.sampled_from([None, None, 0.0, 0.25, 1.0]))
    def put(self, name: str, digest: str, keep: int, share: float | None) -> None:
        if share is not None and name not in self.there:
            with pytest.raises(UnknownAdapter):
                put(self.registry, name, digest, share=share)
            assert self.registry.drop_pending() == 1
            return
        record = put(self.registry, name, digest, keep=keep, share=share)
        assert record.id not in self.ids
        assert record.version == self.versions.get(record.name, 0) + 1
        self.ids.add(record.id)
        self.versions[name] = record.version
        if name not in self.there:
            self.there[name] = Lineage((record,))
            return
        joined = self.there[name].joined_by(record)
        changed = (
            joined.led_by(record.version, like=record)
            if share is None
            else joined.trying(record.version, share)
        )
        self.there[name] = changed.trimmed(keep)

    @precondition(lambda self: self.there)
    @rule(
        data=st.data(),
        keep=keeps,
        change=st.sampled_from(["back", "back to", "try", "promote", "abort", "drop"]),
    )
    def change(self, data: st.DataObject, keep: int, change: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.there)))
        version = data.draw(st.sampled_from([each.version for each in self.there[name].records]))

        def how(lineage: Lineage) -> Lineage:
            match change:
                case "back":
                    return lineage.back_to(lineage.before().version).trimmed(keep)
                case "back to":
                    return lineage.back_to(version).trimmed(keep)
                case "try":
                    return lineage.trying(version, 0.5).trimmed(keep)
                case "promote":
                    return lineage.promoted().trimmed(keep)
                case "abort":
                    return lineage.aborted().trimmed(keep)
            return lineage.without(version)

        try:
            wanted = how(self.there[name])
        except VersionConflict as error:
            with pytest.raises(VersionConflict, match=re.escape(str(error))):
                self.registry.change(name, how)
            return
        assert by_version(self.registry.change(name, how)) == by_version(wanted)
        self.there[name] = wanted

    @rule(name=names)
    def abandon(self, name: str) -> None:
        pending = self.registry.reserve(name, "d9", source="s", rank=1, targets=())
        assert pending.id not in self.ids
        self.ids.add(pending.id)
        self.registry.abandon(pending.id)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.there)))
        assert self.registry.retire(name).id == self.there.pop(name).active.id

    @invariant()
    def agrees(self) -> None:
        found = {lineage.active.name: by_version(lineage) for lineage in self.registry.lineages()}
        assert found == {name: by_version(lineage) for name, lineage in self.there.items()}
        records = [record for lineage in self.there.values() for record in lineage.records]
        assert self.registry.digests_in_use() == {record.digest for record in records}

    def teardown(self) -> None:
        self.registry.close()
        self.directory.cleanup()


def by_version(lineage: Lineage) -> dict[int, AdapterRecord]:
    return {record.version: record for record in lineage.records}


TestRegistryModel = RegistryModel.TestCase
TestRegistryModel.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)


def test_many_threads_take_turns(path: Path) -> None:
    with AdapterRegistry(path, lock_wait_ms=1) as registry, ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda number: put(registry, f"a{number}"), range(200)))
        assert len({record.id for record in records}) == len(registry.active()) == 200
