"""Adapters are read in threads, each once at a time; ahead of requests only those that have to be, and a few."""

import queue
import threading

import pytest

from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_cache import HeldAdapter
from manylora.server.engine.adapter_readers import AHEAD, READERS, AdapterReaders
from manylora.server.engine.observer import SilentEngineObserver
from tests.server.engine.fakes import weights

SECONDS = 20.0
"""How long a test waits for what happens at once, unless it never does."""


class Disk:
    """Adapters whose reads wait until a test lets them go on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun: queue.Queue[int] = queue.Queue()
        self.arrived: queue.Queue[tuple[int, AdapterWeights | Exception]] = queue.Queue()
        self.fault: Exception | None = None
        self.readers = AdapterReaders(
            lambda adapter_id, result: self.arrived.put((adapter_id, result)), SilentEngineObserver()
        )

    def adapter(self, adapter_id: int, *, on_host: bool = False) -> HeldAdapter:
        made = weights(adapter_id)

        def load_from() -> AdapterWeights:
            self.begun.put(adapter_id)
            assert self.go.wait(SECONDS)
            if self.fault is not None:
                raise self.fault
            return made

        return HeldAdapter(adapter_id, made.rank_by_module(), load_from, False, made if on_host else None)

    def results(self, count: int) -> dict[int, AdapterWeights | Exception]:
        return dict(self.arrived.get(timeout=SECONDS) for _ in range(count))


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_what_is_being_read_is_not_read_again_until_it_was_taken_in(disk: Disk) -> None:
    one, two = disk.adapter(1), disk.adapter(2)
    for held in (one, one, two):
        disk.readers.read(held)
    disk.go.set()
    assert disk.results(2).keys() == {1, 2}
    disk.readers.read(one)  # nobody has looked at it yet
    disk.readers.taken(2)
    disk.readers.read(two)
    assert disk.results(1).keys() == {2}
    disk.readers.taken(1)
    disk.readers.read(one)
    assert disk.results(1).keys() == {1}
    assert [disk.begun.get_nowait() for _ in range(disk.begun.qsize())].count(1) == 2
    disk.readers.close()


def test_files_that_can_not_be_read_are_told_of(disk: Disk) -> None:
    disk.fault = OSError("disk")
    disk.go.set()
    disk.readers.read(disk.adapter(1))
    assert disk.results(1) == {1: disk.fault}
    disk.readers.close()


def test_ahead_is_read_what_is_on_disk_only_and_not_leaving_and_so_many(disk: Disk) -> None:
    disk.readers.read_ahead(disk.adapter(100, on_host=True))
    leaving = disk.adapter(101)
    leaving.retired = True
    disk.readers.read_ahead(leaving)
    for adapter_id in range(AHEAD + 3):
        disk.readers.read_ahead(disk.adapter(adapter_id))
    disk.readers.read(disk.adapter(50))  # a request waits for it
    disk.go.set()
    assert disk.results(AHEAD + 1).keys() == {*range(AHEAD), 50}
    disk.readers.close()
    assert disk.arrived.empty()


def test_what_has_not_begun_is_let_go_in_the_end(disk: Disk) -> None:
    for adapter_id in range(READERS + 3):
        disk.readers.read(disk.adapter(adapter_id))
    begun = {disk.begun.get(timeout=SECONDS) for _ in range(READERS)}
    disk.readers.close()
    disk.go.set()
    assert disk.results(READERS).keys() == begun
    assert disk.begun.empty()
