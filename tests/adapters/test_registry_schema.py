"""The registry's tables have a number: earlier ones become today's and lose nothing, newer ones are left alone."""

import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event

from manylora.adapters import registry_schema
from manylora.adapters.errors import DirectoryInUse, RegistryFault, RegistryNewer, StoreFull
from manylora.adapters.keys import KeyTerms
from manylora.adapters.mixtures import MixturePart
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.pairing import open_adapters
from manylora.adapters.records import METADATA
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.registry_schema import NEWEST, SCHEMAS
from tests.adapters.kept.homes import KEPT, contents, copy_of, told
from tests.adapters.putting import put
from tests.docs.examples import blocks_of

EARLIER = tuple(schema for schema in KEPT if schema != NEWEST)
NEWER = str(int(NEWEST) + 1)


def without_pending(rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    return [row for row in rows if row[-1] != "pending"]


def definitions(database: Path) -> set[tuple[str, str]]:
    """What the tables and indices were made by, as one spelling."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {(name, " ".join(sql.split())) for name, sql in rows}


def test_there_is_a_script_and_a_kept_directory_for_every_schema() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(registry_schema.__file__).parent / "migrations"))
    scripts = ScriptDirectory.from_config(config).walk_revisions()
    assert tuple(script.revision for script in scripts)[::-1] == SCHEMAS == KEPT


def test_the_scripts_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    AdapterRegistry(tmp_path / "new.db").close()
    METADATA.create_all(used := create_engine(f"sqlite:///{tmp_path / 'used.db'}"))
    used.dispose()
    made = {each for each in definitions(tmp_path / "new.db") if each[0] != "alembic_version"}
    assert made == definitions(tmp_path / "used.db")
    engine = create_engine(f"sqlite:///{tmp_path / 'new.db'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    engine.dispose()


@pytest.mark.parametrize("schema", KEPT)
def test_what_an_earlier_version_wrote_is_all_there(schema: str, tmp_path: Path) -> None:
    home = copy_of(schema, tmp_path / "data")
    before = contents(home / "registry.db")
    files = {path.name for path in (home / "adapters").iterdir()}
    assert len(before["adapters"]) - len(without_pending(before["adapters"])) == 1
    registry, store = open_adapters(home)
    said = told(schema)["adapters"]
    assert {record.name: record.id for record in registry.active()} == {
        name: each["id"] for name, each in said.items()
    }
    for record in registry.active():
        found = (record.version, record.digest, record.source, record.pinned, record.preload, record.rank)
        kept = said[record.name]
        assert found == tuple(kept[field] for field in ("version", "digest", "src", "pin", "preload", "rank"))
        assert [*record.targets] == kept["target_modules"]
        assert int(record.created_at.timestamp()) == kept["created"]
        assert store.is_intact(record.digest)
    assert {path.name for path in (home / "adapters").iterdir()} == files
    after = contents(home / "registry.db")
    before.pop("alembic_version", None)
    assert {name: after[name] for name in before} == before
    assert registry.drop_pending() == 1
    assert store.sweep(registry.digests_in_use()) == 2, "a staged copy, and what was published for nobody"
    assert registry.was_used()
    used = max(int(str(row[0])) for row in before["adapters"])
    assert put(registry, "new").id == used + 1
    registry.close()
    AdapterRegistry(tmp_path / "new.db").close()
    assert definitions(home / "registry.db") == definitions(tmp_path / "new.db")


def test_mixtures_are_there_again(tmp_path: Path) -> None:
    registry, _ = open_adapters(copy_of("3", tmp_path / "data"))
    found = [(each.id, each.name, each.version, each.parts) for each in registry.mixtures.active()]
    mixed = (MixturePart("plain", 0.5), MixturePart("team/loaded:v1", -0.25))
    assert found == [
        (1, "mixed", 1, mixed),
        (3, "mixed-again", 2, (MixturePart("plain", 0.0), MixturePart("gone", 2.0))),
    ]
    assert registry.mixtures.create("mixed-no-more", mixed).version == 2
    registry.close()


def test_keys_are_there_again(tmp_path: Path) -> None:
    registry, _ = open_adapters(copy_of("4", tmp_path / "data"))
    acme, globex = sorted(registry.keys.all(), key=lambda key: key.terms.tenant)
    assert acme.terms == KeyTerms(
        "acme",
        ("plain", "acme/*", "late@1"),
        requests_per_minute=60,
        tokens_per_minute=1000,
        parallel=2,
        budget=5000,
        weight=0.5,
        priority=3,
        adapter_rows=64,
    )
    assert (acme.spent, acme.revoked_at, globex.terms, globex.spent) == (1234, None, KeyTerms("globex"), 0)
    assert globex.revoked_at is not None
    registry.close()


def test_versions_are_there_again(tmp_path: Path) -> None:
    registry, _ = open_adapters(copy_of("5", tmp_path / "data"))
    [found] = [each for each in registry.lineages() if each.active.name == "replaced"]
    assert [(each.version, each.state.value, each.before, each.share) for each in found.newest_first()] == [
        (3, "active", 2, None),
        (2, "canary", 1, 0.25),
        (1, "kept", None, None),
    ]
    registry.close()


@pytest.mark.parametrize("schema", EARLIER)
def test_how_it_was_is_kept_beside_it_and_can_be_put_back(schema: str, tmp_path: Path) -> None:
    home = copy_of(schema, tmp_path / "data")
    before = contents(home / "registry.db")
    registry, _ = open_adapters(home)
    killed = [(path, path.read_bytes()) for path in home.glob("registry.db*")]
    registry.close()
    for path, content in killed:  # the log comes back, as if the one that changed the tables had been killed
        path.write_bytes(content)
    copy = home / f"registry.db.schema-{schema}"
    assert contents(copy) == before
    assert copy.read_bytes()[18:20] == b"\x01\x01", "one file, without a log that would have to come along"
    assert copy.stat().st_mode == (home / "registry.db").stat().st_mode
    go_back(home, schema)
    assert contents(home / "registry.db") == before
    for registry in (open_adapters(home)[0], open_adapters_again(home)):
        assert {record.name for record in registry.active()} == set(told(schema)["adapters"])
        registry.close()
    assert not list(home.glob(".*"))


def go_back(home: Path, schema: str) -> None:
    """Do what the page on adapters says."""
    pages = Path(__file__).parents[2] / "docs" / "adapters.md"
    (block,) = [
        each for each in blocks_of(pages.read_text()) if "mv registry.db registry.db.newer" in each.lines
    ]
    commands = "\n".join(block.lines[1:]).replace("schema-2", f"schema-{schema}")
    assert block.lines[0].startswith("cd ")
    subprocess.run(["sh", "-ec", commands], cwd=home, check=True)


def open_adapters_again(home: Path) -> AdapterRegistry:
    with contextlib.closing(sqlite3.connect(home / "registry.db")) as connection:
        (number,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    assert number == NEWEST
    return AdapterRegistry(home / "registry.db")


def test_today_s_tables_are_not_copied(tmp_path: Path) -> None:
    home = copy_of(NEWEST, tmp_path / "data")
    open_adapters(home)[0].close()
    assert not list(home.glob("registry.db.schema-*"))


def write_newer(home: Path, *, killed: bool) -> None:
    """Do what a version with a table more does: in the database itself, or in its log when it is killed."""
    database = home / "registry.db"
    kept = home.parent / "kept"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("CREATE TABLE from_the_future (id INTEGER)")
        connection.execute("UPDATE alembic_version SET version_num = ?", (NEWER,))
        if killed:
            shutil.copytree(home, kept)
    if killed:
        shutil.rmtree(home)
        kept.rename(home)


def bytes_of(home: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    found.pop("owner")  # the lock: it says who looked last
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_newer_version_wrote_is_refused_and_untouched(killed: bool, tmp_path: Path) -> None:
    home = copy_of(NEWEST, tmp_path / "data")
    write_newer(home, killed=killed)
    before = bytes_of(home)
    assert any(name.endswith("-wal") for name in before) == killed
    for _ in range(2):
        with pytest.raises(
            RegistryNewer, match=rf"newer version .* \(schema {NEWER}, this one knows up to {NEWEST}\)"
        ) as said:
            open_adapters(home)
        assert "\n" not in str(said.value)
        assert bytes_of(home) == before


def test_a_reader_refuses_it_too(tmp_path: Path) -> None:
    home = copy_of(NEWEST, tmp_path / "data")
    write_newer(home, killed=False)
    before = contents(home / "registry.db")
    with pytest.raises(RegistryNewer):
        AdapterRegistry(home / "registry.db")
    assert contents(home / "registry.db") == before


@pytest.mark.parametrize("schema", EARLIER)
def test_a_migration_that_fails_leaves_what_was(schema: str, tmp_path: Path) -> None:
    home = copy_of(schema, tmp_path / "data")
    with contextlib.closing(sqlite3.connect(home / "registry.db")) as connection:
        connection.execute("CREATE TABLE versions (in_the_way)")  # the last script stumbles over it
        connection.commit()
    before = contents(home / "registry.db")
    for _ in range(2):
        with pytest.raises(RegistryFault, match="table versions already exists"):
            open_adapters(home)
        assert contents(home / "registry.db") == before
    with contextlib.closing(sqlite3.connect(home / "registry.db")) as connection:
        connection.execute("DROP TABLE versions")
    registry, _ = open_adapters(home)
    assert {record.name for record in registry.active()} == set(told(schema)["adapters"])
    registry.close()


@pytest.fixture
def no_room_in_databases() -> Iterator[None]:
    """Databases that SQLAlchemy opens can't grow."""

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}").close()

    event.listen(Engine, "connect", limit)
    yield
    event.remove(Engine, "connect", limit)


@pytest.mark.usefixtures("no_room_in_databases")
@pytest.mark.parametrize("schema", EARLIER)
def test_a_full_disk_leaves_what_was(schema: str, tmp_path: Path) -> None:
    home = copy_of(schema, tmp_path / "data")
    before = contents(home / "registry.db")
    with pytest.raises(StoreFull, match="full"):
        open_adapters(home)
    assert contents(home / "registry.db") == before


NO_ROOM_FOR_AN_INDEX = """
import resource, sys
from pathlib import Path
from manylora.adapters.errors import StoreFull
from manylora.adapters.pairing import open_adapters
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    open_adapters(Path(sys.argv[1]))
except StoreFull:
    print("full")
"""


def test_a_disk_too_full_for_the_log_s_index_is_called_full(tmp_path: Path) -> None:
    """SQLite calls it a fault of the disk. A limit on the size of files, under which the index's 32 KiB don't fit."""
    home = copy_of("2", tmp_path / "data")
    before = contents(home / "registry.db")
    command = [sys.executable, "-c", NO_ROOM_FOR_AN_INDEX, str(home)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "full\n"
    assert contents(home / "registry.db") == before


def test_without_room_for_the_copy_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = copy_of("2", tmp_path / "data")
    before = contents(home / "registry.db")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreFull, match="full"):
            open_adapters(home)
    assert contents(home / "registry.db") == before
    assert not [path for path in home.iterdir() if "schema" in path.name]
    open_adapters(home)[0].close()


def test_a_reader_does_not_change_the_tables_of_an_older_server(tmp_path: Path) -> None:
    home = copy_of("2", tmp_path / "data")
    before = contents(home / "registry.db")
    server = DirectoryLock(home)
    with pytest.raises(DirectoryInUse, match=f"process {os.getpid()} "):
        AdapterRegistry(home / "registry.db")
    assert contents(home / "registry.db") == before
    server.release()
    with AdapterRegistry(home / "registry.db") as registry:
        assert {record.name for record in registry.active()} == set(told("2")["adapters"])
        DirectoryLock(home).release()  # not kept by a reader


UNUSED = """
import sys
from pathlib import Path
import manylora.cli
from manylora.adapters.pairing import open_adapters
open_adapters(Path(sys.argv[1]))[0].close()
assert "alembic" not in sys.modules
"""


def test_a_start_with_today_s_tables_does_not_load_alembic(tmp_path: Path) -> None:
    home = copy_of(NEWEST, tmp_path / "data")
    subprocess.run([sys.executable, "-c", UNUSED, str(home)], check=True)
