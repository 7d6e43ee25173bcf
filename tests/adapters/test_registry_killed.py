"""A migration that is killed, whenever it is, leaves what was or what was wanted, and the next start has all of it."""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from manylora.adapters.pairing import open_adapters
from manylora.adapters.registry_schema import NEWEST
from tests.adapters.kept.homes import KEPT, contents, copy_of, told

MOMENTS = 50
NEVER = 0
EARLIER = tuple(schema for schema in KEPT if schema != NEWEST)

VERSION = "alembic_version"
"""The table that names the schema: made by the first migration, changed by each."""

# Reads "HOME seconds S" or "HOME statement N", opens the registry there in a child, and kills that after S seconds, or
# lets it kill itself before its Nth statement. Answers "killed S" or "ended S": how long the child has lived.
NURSERY = """
import os, signal, sys, time
from pathlib import Path
import alembic.command, alembic.config
from sqlalchemy import Engine, event
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.registry import AdapterRegistry

def die_before(number):
    seen = 0
    @event.listens_for(Engine, "before_cursor_execute")
    def count(*_):
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

def migrate(home, kind, when):
    if kind == "statement":
        die_before(int(when))
    AdapterRegistry(home / "registry.db", lock=DirectoryLock(home)).close()

for line in sys.stdin:
    home, kind, when = line.rsplit(maxsplit=2)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            migrate(Path(home), kind, when)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kind == "seconds":
        time.sleep(max(0.0, began + float(when) - time.monotonic()))
        os.kill(child, signal.SIGKILL)  # a child that has ended is there until it is waited for
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, status
    print("killed" if os.WIFSIGNALED(status) else "ended", time.monotonic() - began, flush=True)
"""


class Nursery:
    """Processes that have imported everything, each for one migration that may be killed."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def migrate(self, home: Path, kind: str, when: float) -> tuple[bool, float]:
        """Return whether it was killed, and how long it lived."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{home} {kind} {when}\n")
        self._process.stdin.flush()
        end, seconds = self._process.stdout.readline().split()
        return end == "killed", float(seconds)


@contextmanager
def nursery() -> Iterator[Nursery]:
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Nursery(process)
    finally:
        process.communicate()
    assert process.returncode == 0


class Case:
    """A directory of one schema, and what must be in it after a kill, and after the start that follows."""

    def __init__(self, schema: str, place: Path) -> None:
        self.schema = schema
        self.place = place
        self.before = contents(copy_of(schema, place / "untouched") / "registry.db")
        shutil.copytree(place / "untouched", place / "wanted")
        (home,) = (place / "wanted").iterdir()
        registry, _ = open_adapters(home)
        self.mixtures = registry.mixtures.active()
        registry.close()
        self.after = contents(home / "registry.db")

    def fresh(self) -> Path:
        """Return a home that nobody has opened yet."""
        shutil.rmtree(self.place / "data", ignore_errors=True)
        return copy_of(self.schema, self.place / "data")

    def kept_in(self, found: Mapping[str, object]) -> bool:
        """Return whether every table is there as it was, but for the schema's number."""
        return all(found[name] == rows for name, rows in self.before.items() if name != VERSION)

    def check(self, home: Path) -> bool:
        """Check a home after a kill, start again in it, and return whether the killed one had got through."""
        found = contents(home / "registry.db")
        through = found.get(VERSION) == self.after[VERSION]
        assert self.kept_in(found)
        assert found.keys() == (self.after.keys() if through else self.before.keys())
        copy = home / f"registry.db.schema-{self.schema}"
        assert copy.exists() or not through
        if copy.exists():
            assert contents(copy) == self.before
        registry, _ = open_adapters(home)
        said = told(self.schema)["adapters"]
        assert {(record.name, record.id, record.version, record.pinned) for record in registry.active()} == {
            (name, each["id"], each["version"], each["pin"]) for name, each in said.items()
        }
        assert registry.mixtures.active() == self.mixtures
        assert self.before.get("identity", [(registry.identity, 1)]) == [(registry.identity, 1)]
        registry.close()
        after = contents(home / "registry.db")
        assert self.kept_in(after)
        assert contents(copy) == self.before
        assert not list(home.glob(".*")), "no half of a copy is left"
        return through


@pytest.mark.parametrize("schema", EARLIER)
def test_killed_at_any_moment_it_leaves_what_was(schema: str, tmp_path: Path) -> None:
    chance = random.Random(schema)
    case = Case(schema, tmp_path)
    with nursery() as processes:
        whole = min(processes.migrate(case.fresh(), "statement", NEVER)[1] for _ in range(3))
        killed = 0
        for _ in range(MOMENTS):
            home = case.fresh()
            killed += processes.migrate(home, "seconds", chance.uniform(0, whole))[0]
            case.check(home)
    assert killed > 0, "the moments lie within the migration"


@pytest.mark.parametrize("schema", EARLIER)
def test_killed_before_any_statement_it_leaves_what_was(schema: str, tmp_path: Path) -> None:
    case = Case(schema, tmp_path)
    number, killed = 1, True
    through = []
    with nursery() as processes:
        while killed:
            home = case.fresh()
            killed, _ = processes.migrate(home, "statement", number)
            through.append(case.check(home))
            number += 1
    assert through.count(False) > 10, "there are many statements, and each was the first not to run"
    assert through == sorted(through), "all in one transaction"
    assert through[-1]
