"""Attempts that come to nothing leave versions and served adapters alone, and another process is waited for."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora.adapters.records import AdapterRecord
from manylora.adapters.registry import AdapterRegistry
from tests.adapters.putting import put


@pytest.fixture
def registry(path: Path) -> Iterator[AdapterRegistry]:
    with AdapterRegistry(path) as opened:
        yield opened


def begin(registry: AdapterRegistry, name: str, digest: str) -> AdapterRecord:
    return registry.reserve(name, digest, source="here", rank=4, targets=("q_proj",))


def test_a_version_is_counted_once_it_is_served(registry: AdapterRegistry) -> None:
    put(registry, "a")
    first, second = begin(registry, "a", "d2"), begin(registry, "a", "d3")
    assert (first.version, second.version) == (2, 2), "an attempt that may fail takes no version"
    registry.abandon(first.id)
    assert registry.activate(second).active.version == 2


def test_what_is_served_is_not_abandoned(registry: AdapterRegistry) -> None:
    served = put(registry, "a")
    registry.abandon(served.id)
    assert registry.active()[0] == served


def test_another_process_that_writes_is_waited_for(path: Path) -> None:
    """Also by what reads first and writes then: SQLite would refuse to let it wait for a lock half-way."""
    with AdapterRegistry(path, lock_wait_ms=30_000) as registry:
        put(registry, "a")
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE adapters SET source = 'elsewhere' WHERE name = 'a'")
        releasing = threading.Timer(0.3, lambda: other.execute("COMMIT"))
        releasing.start()
        try:
            replaced = put(registry, "a", "d2")
        finally:
            releasing.join()
            other.close()
        assert replaced.version == 2
        assert registry.active()[0] == replaced


def test_served_adapters_are_listed_by_name(registry: AdapterRegistry) -> None:
    for name in ("c", "a", "b"):
        put(registry, name)
    assert [record.name for record in registry.active()] == ["a", "b", "c"]
