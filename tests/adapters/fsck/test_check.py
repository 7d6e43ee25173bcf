"""What is wrong in a data directory is found, said with what it is about, and swept where a crash left it."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from manylora.adapters.errors import DirectoryInUse, RegistryNewer
from manylora.adapters.files import digest_of
from manylora.adapters.fsck.check import Checked, check, mend
from manylora.adapters.mixtures import MixturePart
from manylora.adapters.pairing import open_adapters
from tests.adapters.making import write
from tests.adapters.putting import put
from tests.adapters.test_pairing import HOLD, remove_registry

PARTS = [MixturePart("a@1", 0.5), MixturePart("b", 2.0)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """``a`` in three versions, one a canary; ``b``; a mixture of both; a name that was deleted."""
    path = tmp_path / "home"
    path.mkdir()
    registry, _ = open_adapters(path)
    digests = [publish(path, write(tmp_path / str(seed), seed)) for seed in range(4)]
    with registry:
        for number, share in ((0, None), (1, None), (2, 0.25)):
            put(registry, "a", digests[number], keep=2, share=share)
        put(registry, "b", digests[3])
        put(registry, "gone", digests[3])
        registry.retire("gone")
        registry.mixtures.create("both", PARTS)
    return path


def publish(home: Path, source: Path) -> str:
    digest = digest_of(source, 1 << 20)
    shutil.copytree(source, home / "adapters" / digest)
    return digest


def sql(*statements: str) -> Callable[[Path], None]:
    def run(home: Path) -> None:
        with closing(sqlite3.connect(home / "registry.db")) as database, database:
            for statement in statements:
                database.execute(statement)

    return run


def files_of(home: Path, name: str, version: int = 1) -> Path:
    with closing(sqlite3.connect(home / "registry.db")) as database:
        row = database.execute("SELECT digest FROM adapters WHERE name = ? AND version = ?", (name, version))
        return home / "adapters" / str(row.fetchone()[0])


def listed(found: Checked) -> list[tuple[str, str, str]]:
    return [(each.level, each.kind, each.subject) for each in found.findings]


def test_a_directory_as_servers_leave_it_is_sound_and_stays_as_it_was(home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.name != "owner"}
    done: list[tuple[int, int]] = []
    found = check(home, lambda number, of: done.append((number, of)))
    assert (found.findings, found.is_sound) == ((), True)
    assert (found.adapters, found.versions, found.mixtures, found.stored) == (2, 4, 1, 4)
    assert found.nbytes == sum(
        path.stat().st_size for path in (home / "adapters").rglob("*") if path.is_file()
    )
    assert done == [(number, 4) for number in range(1, 5)]
    assert {path: path.read_bytes() for path in before} == before
    assert mend(home, found) == found
    empty = home.parent / "empty"
    empty.mkdir()
    assert check(empty).is_sound


def damage(home: Path) -> None:
    weights = files_of(home, "a", 2) / "adapter_model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def lose(home: Path) -> None:
    shutil.rmtree(files_of(home, "b"))


def put_another(home: Path) -> None:
    (home / "registry.id").write_text("other")
    (home / "adapters" / ("f" * 64)).mkdir()


FAULTS: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "lost files": (lose, "files", "", "the files of b@1 are gone"),
    "damaged files": (damage, "files", "", "the files of a@2 are damaged"),
    "no active": (
        sql("UPDATE adapters SET state = 'kept' WHERE state = 'active' AND name = 'a'"),
        "version",
        "a",
        "0 of",
    ),
    "odd state": (
        sql("UPDATE adapters SET state = 'odd' WHERE name = 'b' AND version = 1"),
        "version",
        "b@1",
        "'odd'",
    ),
    "share of a kept": (sql("UPDATE versions SET share = 0.5"), "version", "a@2", "its share"),
    "share beyond 1": (sql("UPDATE versions SET share = 7 WHERE share IS NOT NULL"), "version", "a@3", "7"),
    "way back to nothing": (
        sql("UPDATE versions SET before = 9 WHERE before IS NOT NULL"),
        "version",
        "a@2",
        "9",
    ),
    "a number twice": (sql("UPDATE adapters SET version = 1 WHERE name = 'a'"), "version", "a@1", "several"),
    "two kinds": (sql("UPDATE mixtures SET name = 'b'"), "name", "b", "an adapter and a mixture"),
    "a bad name": (sql("UPDATE adapters SET name = 'x/../y' WHERE name = 'gone'"), "name", "x/../y", "'..'"),
    "parts that are none": (sql("UPDATE mixtures SET parts = '[{}]'"), "mixture", "both", "make no sense"),
    "no parts": (sql("UPDATE mixtures SET parts = '[]'"), "mixture", "both", "no parts"),
    "a part twice": (
        sql(
            """UPDATE mixtures SET parts = '[{"adapter": "a", "weight": 1}, {"adapter": "a", "weight": 2}]'"""
        ),
        *("mixture", "both", "2 times"),
    ),
    "itself": (
        sql("""UPDATE mixtures SET parts = '[{"adapter": "both", "weight": 1}]'"""),
        "mixture",
        "both",
        "is a mixture",
    ),
    "an infinite weight": (
        sql("""UPDATE mixtures SET parts = '[{"adapter": "a", "weight": 1e400}]'"""),
        *("mixture", "both", "finite"),
    ),
    "another registry": (
        put_another,
        *("registry", "registry.db", "or another one"),
    ),
    "an emptied registry": (sql("DELETE FROM adapters"), "registry", "registry.db", "emptied"),
    "no registry": (remove_registry, "registry", "registry.db", "files of 4 adapters"),
    "a torn registry": (
        lambda home: os.truncate(home / "registry.db", 9000),
        *("registry", "registry.db", "registry"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_is_swept_for_it(home: Path, name: str) -> None:
    make, kind, subject, says = FAULTS[name]
    make(home)
    (home / "adapters" / ".staging" / "half").mkdir()
    stored = sorted((home / "adapters").iterdir())
    found = check(home)
    assert not found.is_sound
    faults = [each for each in found.findings if each.level == "fault"]
    assert any(each.kind == kind and subject in each.subject and says in each.message for each in faults), (
        found.findings
    )
    if kind == "registry":
        assert mend(home, found) == found
        assert sorted((home / "adapters").iterdir()) == stored


def leave_an_orphan(home: Path) -> None:
    shutil.copytree(files_of(home, "b"), home / "adapters" / ("e" * 64))


def leave_a_copy(home: Path) -> None:
    shutil.copytree(files_of(home, "b"), home / "adapters" / ".staging" / "half")


def leave_an_attempt(home: Path) -> None:
    sql(
        "INSERT INTO adapters (name, version, digest, source, rank, targets, pinned, preload, created_at, state)"
        " SELECT 'late', 1, digest, source, rank, targets, pinned, preload, created_at, 'pending' FROM adapters"
        " WHERE name = 'b'"
    )(home)


@pytest.mark.parametrize(
    ("leave", "kind", "subject"),
    [
        (leave_an_orphan, "orphan", "e" * 64),
        (leave_a_copy, "staging", "half"),
        (leave_an_attempt, "pending", "late@1"),
    ],
)
def test_what_a_crash_left_is_found_and_swept(
    home: Path, leave: Callable[[Path], None], kind: str, subject: str
) -> None:
    leave(home)
    found = check(home)
    assert (listed(found), found.is_sound) == ([("leftover", kind, subject)], False)
    mended = mend(home, found)
    assert ([each.repaired for each in mended.findings], mended.is_sound) == ([True], True)
    after = check(home)
    assert (after.findings, after.adapters, after.stored) == ((), 2, 4)


def test_what_may_be_is_told_and_left_alone(home: Path) -> None:
    registry, _ = open_adapters(home)
    with registry:
        registry.retire("b")
    (home / "adapters" / "notes.txt").write_text("mine")
    found = check(home)
    assert ("note", "mixture", "both") in listed(found)
    assert ("note", "stranger", "notes.txt") in listed(found)
    mended = mend(home, found)
    assert mended.is_sound
    assert (home / "adapters" / "notes.txt").read_text() == "mine"
    assert not (home / "adapters" / files_of(home, "b").name).exists(), "swept: nothing uses it any more"


def test_a_directory_that_a_server_uses_or_a_newer_one_wrote_is_refused(home: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(DirectoryInUse, match=f"process {holder.pid}"):
            check(home)
        holder.kill()
    sql("UPDATE alembic_version SET version_num = '99'")(home)
    with pytest.raises(RegistryNewer):
        check(home)
