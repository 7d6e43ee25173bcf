"""Changes of the arena are carried out in their order, for as long as there is time, and say how fast that goes."""

import math
from collections.abc import Iterator

import pytest

from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_cache import AdapterCache, HeldAdapter
from manylora.server.engine.arena_writer import LEAST_RATE, ArenaWriter
from manylora.server.engine.observer import SilentEngineObserver
from manylora.server.kernels.step import AdapterRanges, RankRange
from tests.server.engine.fakes import weights

ROW_BYTES = 1 << 28
"""Of each of two modules."""


class Heard(SilentEngineObserver):
    """Keeps how long adapters took."""

    def __init__(self) -> None:
        self.placed: list[float] = []

    def adapter_placed(self, seconds: float) -> None:
        self.placed.append(seconds)


class Slow:
    """An arena and a clock: a change has three pieces, and each takes a second. It raises where a test says so."""

    def __init__(self, rows: int = 8) -> None:
        self.now = 0.0
        self.done: list[str] = []
        self.fault = ""
        modules = ("q_proj", "v_proj")
        self.cache = AdapterCache(dict.fromkeys(modules, rows), 1 << 30, dict.fromkeys(modules, ROW_BYTES))
        self.heard = Heard()
        self.writer = ArenaWriter(self, self.cache, self.heard)

    def know(self, adapter_id: int, rank: int = 4) -> None:
        made = weights(adapter_id, rank)
        self.cache.add(HeldAdapter(adapter_id, made.rank_by_module(), lambda: made, False, made))

    def place(self, *adapter_ids: int) -> None:
        self.writer.add(self.cache.place(set(adapter_ids), set()))

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        return self._pieces(f"write {int(next(iter(weights.pairs.values())).a[0, 0])}")

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        return self._pieces(f"move {module}")

    def release(self, ranges: AdapterRanges) -> None:
        self.done.append("release")

    def _pieces(self, what: str) -> Iterator[None]:
        for _ in range(3):
            if what == self.fault:
                raise RuntimeError("boom")
            self.now += 1.0
            self.done.append(what)
            yield


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    made = Slow()
    monkeypatch.setattr("manylora.server.engine.arena_writer.time.perf_counter", lambda: made.now)
    return made


def test_pieces_are_done_until_the_time_is_over_and_one_at_least(slow: Slow) -> None:
    for adapter_id in (1, 2):
        slow.know(adapter_id)
        slow.place(adapter_id)
    told = []
    for seconds in (0.0, 1.0, 2.0, math.inf):
        assert slow.writer.pending
        assert not slow.writer.work(seconds)
        told.append((len(slow.done), slow.cache.resident({1}), slow.cache.resident({2})))
    assert told == [(1, False, False), (2, False, False), (4, True, False), (6, True, True)]
    assert slow.done == ["write 1"] * 3 + ["write 2"] * 3
    assert not slow.writer.pending


def test_what_an_adapter_took_says_how_much_is_written_in_a_while(slow: Slow) -> None:
    """All of its time, over several calls, and none of what came between them or of others."""
    slow.know(1)
    slow.place(1)
    while slow.writer.pending:
        slow.writer.work(0.0)
        slow.now += 100.0
    assert slow.heard.placed == [3.0]
    assert slow.writer.bytes_in(3.0) == 8 * ROW_BYTES
    slow.know(2, rank=1)
    slow.place(2)
    slow.writer.work(math.inf)
    assert slow.heard.placed == [3.0, 3.0]
    assert slow.writer.bytes_in(1.0) == LEAST_RATE, "a write that was held up is not believed"


def test_what_left_the_device_meanwhile_is_not_written_and_says_nothing(slow: Slow) -> None:
    for adapter_id in (1, 2):
        slow.know(adapter_id)
        slow.place(adapter_id)
    slow.writer.work(0.0)
    rate = slow.writer.bytes_in(1.0)
    slow.cache.evict(1)
    assert not slow.writer.work(0.0)
    assert slow.done == ["write 1"]
    assert (slow.heard.placed, slow.writer.bytes_in(1.0)) == ([], rate)
    slow.writer.work(math.inf)
    assert slow.done == ["write 1"] + ["write 2"] * 3
    assert slow.heard.placed == [3.0]


def test_a_write_that_fails_takes_its_adapter_off_the_device_and_the_next_goes_on(slow: Slow) -> None:
    for adapter_id in (1, 2):
        slow.know(adapter_id)
        slow.place(adapter_id)
    slow.fault = "write 1"
    [(adapter_ids, error)] = slow.writer.work(math.inf)
    assert adapter_ids == {1}
    assert str(error) == "boom"
    assert (slow.cache.tier(1), slow.cache.tier(2)) == ("host", "device")
    assert slow.heard.placed == [3.0]


def test_a_move_that_fails_takes_all_off_the_device_and_what_was_to_follow_with_it(slow: Slow) -> None:
    """Moves build on each other: no range is where the books say."""
    for adapter_id, rank in ((1, 2), (2, 4), (3, 4)):
        slow.know(adapter_id, rank)
    for adapter_id in (1, 2):
        slow.place(adapter_id)
    slow.writer.work(math.inf)
    slow.cache.evict(1)
    slow.writer.add(slow.cache.place({3}, {2}))
    slow.fault = "move q_proj"
    [(adapter_ids, _)] = slow.writer.work(math.inf)
    assert adapter_ids == {2, 3}
    assert not slow.writer.pending
    assert {slow.cache.tier(adapter_id) for adapter_id in (1, 2, 3)} == {"host"}
    slow.cache.check_integrity()
