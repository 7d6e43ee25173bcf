"""A directory of adapters: one owner, and files whose registry is gone are kept until somebody says otherwise."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterError, DirectoryInUse, RegistryLost
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.pairing import open_adapters
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.sources.local import LocalSource
from manylora.adapters.store import AdapterStore
from tests.adapters.making import write

HOLD = """
import sys
from pathlib import Path
from manylora.adapters.ownership import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def fill(home: Path, *, activate: bool = True) -> str:
    """Register one adapter in ``home`` and close it; returns its digest."""
    registry, store = open_adapters(home)
    source = write(home.parent / "source")
    digest = store.publish(store.stage(LocalSource(source))).name
    record = registry.reserve("a", digest, source="here", rank=4, targets=("q_proj",))
    if activate:
        registry.activate(record)
    registry.close()
    return digest


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


def remove_registry(home: Path) -> None:
    for path in home.glob("registry*"):
        path.unlink()


def empty_the_file(home: Path) -> None:
    for path in home.glob("registry.db*"):
        path.write_bytes(b"")


def empty_the_table(home: Path) -> None:
    with sqlite3.connect(home / "registry.db") as connection:
        connection.execute("DELETE FROM adapters")
    connection.close()


def put_another(home: Path) -> None:
    other = home.parent / "other"
    other.mkdir()
    fill(other)
    for path in home.glob("registry.db*"):
        path.unlink()
    with sqlite3.connect(other / "registry.db") as connection:
        connection.execute("UPDATE adapters SET digest = 'another'")
    connection.close()  # the last one: what is in the log comes into the file
    (other / "registry.db").rename(home / "registry.db")


def forget_the_mark_and_the_file(home: Path) -> None:
    """What a directory from before there were marks looks like."""
    (home / "registry.id").unlink()
    (home / "registry.db").unlink()


@pytest.mark.parametrize(
    "lose", [remove_registry, empty_the_file, empty_the_table, put_another, forget_the_mark_and_the_file]
)
def test_files_whose_registry_is_gone_stop_the_start(home: Path, lose: object) -> None:
    digest = fill(home)
    assert callable(lose)
    lose(home)
    for _ in range(2):  # the second start finds what the first one made
        with pytest.raises(RegistryLost, match=r"files of 1 adapters.*registry\.db.*--start-anew"):
            open_adapters(home)
        assert AdapterStore(home / "adapters").digests() == {digest}
    registry, store = open_adapters(home, start_anew=True)
    store.sweep(registry.digests_in_use())
    registry.close()
    registry, store = open_adapters(home)
    assert store.digests() == frozenset()
    registry.close()


def test_a_registry_that_is_put_back_is_known_again(home: Path) -> None:
    fill(home)
    kept = (home / "registry.db").read_bytes()
    remove_registry(home)
    with pytest.raises(RegistryLost):
        open_adapters(home)
    for path in home.glob("registry.db*"):
        path.unlink()
    (home / "registry.db").write_bytes(kept)
    registry, _ = open_adapters(home)
    assert [record.name for record in registry.active()] == ["a"]
    registry.close()


def test_what_a_crash_leaves_of_the_very_first_registration_is_no_loss(home: Path) -> None:
    fill(home, activate=False)
    registry, store = open_adapters(home)
    registry.drop_pending()
    registry.close()
    registry, store = open_adapters(home)
    assert store.sweep(registry.digests_in_use()) == 1
    registry.close()


def test_a_directory_without_files_and_one_from_before_there_were_marks_start(home: Path) -> None:
    registry, store = open_adapters(home)
    registry.close()
    digest = fill(home)
    (home / "registry.id").unlink()
    with sqlite3.connect(home / "registry.db") as connection:
        for table in ("identity", "mixtures", "keys", "versions", "alembic_version"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("DROP INDEX one_canary_per_name")
    connection.close()
    registry, store = open_adapters(home)
    assert registry.digests_in_use() == store.digests() == {digest}
    registry.close()
    registry, store = open_adapters(home)
    registry.retire("a")
    store.remove(digest)
    registry.close()
    registry, _ = open_adapters(home)
    assert registry.active() == []
    registry.close()


def test_a_second_owner_is_told_who_the_first_is(home: Path) -> None:
    registry, _ = open_adapters(home)
    with pytest.raises(DirectoryInUse, match=rf"process {os.getpid()} serves"):
        open_adapters(home)
    with AdapterRegistry(home / "registry.db") as reader:
        assert reader.active() == []
    registry.close()
    registry, _ = open_adapters(home)
    registry.close()


def test_an_owner_that_is_killed_owns_nothing(home: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(DirectoryInUse, match=f"process {owner.pid} "):
            DirectoryLock(home)
    finally:
        owner.kill()
        owner.communicate()
    DirectoryLock(home).release()


def test_what_fails_to_open_is_let_go(home: Path) -> None:
    (home / "registry.db").write_bytes(b"not a database at all" * 100)
    for _ in range(2):
        with pytest.raises(AdapterError, match="can't be used"):
            open_adapters(home)
