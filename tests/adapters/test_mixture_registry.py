"""Mixtures in the registry: ids of their own, one owner per name on both sides, and a way out of a full disk."""

import contextlib
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from manylora.adapters.errors import AdapterNameTaken, InvalidAdapter, StoreFull, UnknownAdapter
from manylora.adapters.mixtures import MixturePart, part_weight
from manylora.adapters.records import AdapterRecord, AdapterState, MixtureRecord
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.reserve import Reserve
from tests.adapters.putting import put

PARTS = (MixturePart("sql", part_weight("sql", 0.7)), MixturePart("pirate", part_weight("pirate", -1e-30)))
OTHERS = (MixturePart("sql", 1.0), MixturePart("team/v1:2", 0.0))


def test_a_mixture_is_there_again_with_every_weight(registry: AdapterRegistry, path: Path) -> None:
    made = registry.mixtures.create("mix", PARTS)
    other = registry.mixtures.create("another", OTHERS)
    assert (made.id, made.version, made.parts) == (1, 1, PARTS)
    registry.close()
    with AdapterRegistry(path) as again:
        assert again.mixtures.active() == [other, made]


def test_the_same_parts_again_are_the_same_mixture(registry: AdapterRegistry) -> None:
    made = registry.mixtures.create("mix", PARTS)
    assert registry.mixtures.create("mix", PARTS) == made
    assert registry.mixtures.create("mix", PARTS[::-1]) == made
    with pytest.raises(AdapterNameTaken, match="other parts"):
        registry.mixtures.create("mix", OTHERS)
    assert registry.mixtures.active() == [made]


def test_other_parts_are_a_new_id_and_version_and_the_same_ones_are_not(registry: AdapterRegistry) -> None:
    made = registry.mixtures.create("mix", PARTS)
    assert registry.mixtures.replace("mix", PARTS) == made
    replaced = registry.mixtures.replace("mix", OTHERS)
    assert (replaced.id, replaced.version, replaced.parts) == (2, 2, OTHERS)
    assert registry.mixtures.active() == [replaced]
    turned = registry.mixtures.replace("mix", OTHERS[::-1])
    assert (turned.version, turned.parts) == (3, OTHERS[::-1]), "parts are told in the order given"
    with pytest.raises(UnknownAdapter, match="no mixture 'none'; mixtures: mix"):
        registry.mixtures.replace("none", PARTS)


def test_ids_and_versions_go_on_counting_after_a_delete(registry: AdapterRegistry, path: Path) -> None:
    made = registry.mixtures.create("mix", PARTS)
    assert registry.mixtures.retire("mix") == made
    assert registry.mixtures.active() == []
    with pytest.raises(UnknownAdapter, match="no mixture"):
        registry.mixtures.retire("mix")
    registry.close()
    with AdapterRegistry(path) as again:
        back = again.mixtures.create("mix", PARTS)
    assert (back.id, back.version) == (2, 2)


def test_ids_of_mixtures_and_of_adapters_are_two_sequences(registry: AdapterRegistry) -> None:
    assert put(registry, "a").id == registry.mixtures.create("mix", PARTS).id == 1
    assert (put(registry, "b").id, registry.mixtures.create("max", PARTS).id) == (2, 2)


def test_a_name_belongs_to_an_adapter_or_to_a_mixture(registry: AdapterRegistry) -> None:
    pending = registry.reserve("mix", "d", source="s", rank=1, targets=())
    made = registry.mixtures.create("mix", PARTS)
    with pytest.raises(AdapterNameTaken, match="'mix' is the name of a mixture"):
        registry.activate(pending)
    with pytest.raises(AdapterNameTaken, match="'mix' is the name of a mixture"):
        put(registry, "mix")
    assert (registry.active(), registry.was_used()) == ([], False)
    put(registry, "a")
    with pytest.raises(AdapterNameTaken, match="'a' is the name of an adapter"):
        registry.mixtures.create("a", PARTS)
    assert registry.mixtures.active() == [made]
    registry.mixtures.retire("mix")
    registry.retire("a")
    assert registry.activate(pending).active.name == "mix"
    assert registry.mixtures.create("a", PARTS).name == "a"


@pytest.mark.parametrize("name", ["", "a+b", "base", "a/../b"])
def test_bad_names_are_refused(registry: AdapterRegistry, name: str) -> None:
    with pytest.raises(InvalidAdapter, match="name"):
        registry.mixtures.create(name, PARTS)


def test_mixtures_keep_no_files(registry: AdapterRegistry) -> None:
    registry.mixtures.create("mix", PARTS)
    assert registry.digests_in_use() == frozenset()
    assert registry.is_empty()
    assert not registry.was_used()


class FullDisk(Reserve):
    """A disk on which nothing of mixtures can be written, until the reserve is given up."""

    def __init__(self, database: Path) -> None:
        super().__init__(database.with_name("reserve"))
        self._database = database

    def fill(self) -> None:
        for kind in ("INSERT", "UPDATE"):
            self.execute(
                f"CREATE TRIGGER full_{kind} BEFORE {kind} ON mixtures"
                " BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            )

    def give_up(self) -> bool:
        held = super().give_up()
        if held:
            for kind in ("INSERT", "UPDATE"):
                self.execute(f"DROP TRIGGER full_{kind}")
        return held

    def execute(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self._database, isolation_level=None)) as connection:
            connection.execute(statement)


def test_a_mixture_is_deleted_on_a_full_disk(path: Path) -> None:
    disk = FullDisk(path)
    with AdapterRegistry(path, reserve=disk) as registry:
        made = registry.mixtures.create("mix", PARTS)
        disk.fill()
        with pytest.raises(StoreFull):
            registry.mixtures.create("max", PARTS)
        assert registry.mixtures.active() == [made]
        assert registry.mixtures.retire("mix") == made
        assert registry.mixtures.active() == []
        assert path.with_name("reserve").stat().st_size == 128 << 10, "held again for the next time"


def test_a_replacement_that_fails_in_the_middle_leaves_what_was(path: Path) -> None:
    with AdapterRegistry(path) as registry:
        made = registry.mixtures.create("mix", PARTS)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(
                "CREATE TRIGGER fails BEFORE INSERT ON mixtures BEGIN SELECT RAISE(ABORT, 'disk I/O error'); END"
            )
        with pytest.raises(Exception, match="disk I/O"):
            registry.mixtures.replace("mix", OTHERS)
        assert registry.mixtures.active() == [made]
        with contextlib.closing(sqlite3.connect(path)) as other:
            states = other.execute("SELECT state FROM mixtures").fetchall()
        assert states == [(AdapterState.ACTIVE.value,)]


class NamesModel(RuleBasedStateMachine):
    """Adapters and mixtures take, change and leave the same few names, in any order, against two dictionaries."""

    names = st.sampled_from(["a", "b", "c"])
    parts = st.sampled_from([PARTS, OTHERS, PARTS[:1]])

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.registry = AdapterRegistry(
            Path(":memory:"), reserve=Reserve(Path(self.directory.name) / "reserve", 1)
        )
        self.adapters: dict[str, AdapterRecord] = {}
        self.mixtures: dict[str, MixtureRecord] = {}
        self.last_id = 0
        self.versions: dict[str, int] = {}

    def fresh(self, record: MixtureRecord, parts: tuple[MixturePart, ...]) -> None:
        assert record.parts == parts
        assert record.id > self.last_id
        assert record.version == self.versions.get(record.name, 0) + 1
        self.last_id = record.id
        self.versions[record.name] = record.version
        self.mixtures[record.name] = record

    @rule(name=names)
    def put_adapter(self, name: str) -> None:
        pending = self.registry.reserve(name, "d", source="s", rank=1, targets=())
        if name in self.mixtures:
            with pytest.raises(AdapterNameTaken):
                self.registry.activate(pending)
            self.registry.abandon(pending.id)
        else:
            self.adapters[name] = self.registry.activate(pending).active

    @rule(name=names)
    def retire_adapter(self, name: str) -> None:
        if self.adapters.pop(name, None) is not None:
            self.registry.retire(name)

    @rule(name=names, parts=parts)
    def create(self, name: str, parts: tuple[MixturePart, ...]) -> None:
        before = self.mixtures.get(name)
        if name in self.adapters or (before is not None and before.parts != parts):
            with pytest.raises(AdapterNameTaken):
                self.registry.mixtures.create(name, parts)
        elif before is not None:
            assert self.registry.mixtures.create(name, parts) == before
        else:
            self.fresh(self.registry.mixtures.create(name, parts), parts)

    @rule(name=names, parts=parts)
    def replace(self, name: str, parts: tuple[MixturePart, ...]) -> None:
        before = self.mixtures.get(name)
        if before is None:
            with pytest.raises(UnknownAdapter):
                self.registry.mixtures.replace(name, parts)
        elif before.parts == parts:
            assert self.registry.mixtures.replace(name, parts) == before
        else:
            self.fresh(self.registry.mixtures.replace(name, parts), parts)

    @rule(name=names)
    def retire(self, name: str) -> None:
        before = self.mixtures.pop(name, None)
        if before is None:
            with pytest.raises(UnknownAdapter):
                self.registry.mixtures.retire(name)
        else:
            assert self.registry.mixtures.retire(name) == before

    @invariant()
    def agrees(self) -> None:
        assert {record.name for record in self.registry.active()} == self.adapters.keys()
        assert {record.name: record for record in self.registry.mixtures.active()} == self.mixtures
        assert not self.adapters.keys() & self.mixtures.keys()

    def teardown(self) -> None:
        self.registry.close()
        self.directory.cleanup()


TestNamesModel = NamesModel.TestCase
TestNamesModel.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
