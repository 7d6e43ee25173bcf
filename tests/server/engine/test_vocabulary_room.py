"""Memory for adapters' own embeddings and heads: given, taken back and refused as rank rows are, by bytes."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from manylora.adapters.types import AdapterWeights
from manylora.adapters.vocabulary import UNIT, VOCABULARY, TokenDelta, TokenRows, VocabularyDelta
from manylora.server.engine.adapter_cache import AdapterCache, ArenaChange, HeldAdapter, Placement, Write
from manylora.server.engine.arena_writer import ArenaWriter
from manylora.server.engine.leaving import Leaving
from manylora.server.engine.observer import SilentEngineObserver
from manylora.server.engine.room import lack
from manylora.server.errors import AdapterUnavailable
from manylora.server.kernels.step import AdapterRanges, RankRange
from manylora.server.kernels.vocabularies import Vocabularies
from tests.server.engine.fakes import Harness, weights

ROWS = {"q_proj": 16, "v_proj": 16, VOCABULARY: 8}


def with_head(adapter_id: int, units: int) -> AdapterWeights:
    rows = TokenRows(torch.full((units * UNIT // 4 // 64, 64), float(adapter_id)), None)
    delta = VocabularyDelta(len(rows.rows), TokenDelta(), TokenDelta(rows))
    return replace(weights(adapter_id, 2), vocabulary=delta)


def _never() -> AdapterWeights:
    raise AssertionError("nobody reads it again")


def cache_of(*adapters: tuple[int, int], units: int = 8) -> AdapterCache:
    cache = AdapterCache({**ROWS, VOCABULARY: units}, 1 << 30, dict.fromkeys(ROWS, 8))
    for adapter_id, size in adapters:
        made = with_head(adapter_id, size)
        cache.add(HeldAdapter(adapter_id, made.rank_by_module(), _never, False, made))
    return cache


def placed(cache: AdapterCache, adapter_id: int) -> list[ArenaChange]:
    changes = list(cache.place({adapter_id}, set()))
    for change in changes:
        cache.carried_out(change)
    return changes


def test_what_does_not_fit_beside_those_in_use_waits_and_pushes_out_who_is_idle() -> None:
    cache = cache_of((1, 5), (2, 4), (3, 3))
    placed(cache, 1)
    assert cache.can_place({2}, {1}) is Placement.NO_ROOM
    assert cache.can_place({3}, {1}) is Placement.LOADABLE
    assert cache.can_place({2}, set()) is Placement.LOADABLE
    [write] = placed(cache, 2)
    assert isinstance(write, Write)
    assert write.ranges[VOCABULARY].rank == 4
    assert cache.tier(1) == "host"
    assert cache.device_bytes(2) == (4 + 2 + 2) * 8
    cache.check_integrity()


def test_of_one_that_was_never_read_it_is_known_only_what_it_takes_at_most() -> None:
    cache = cache_of()
    made = with_head(1, 3)
    most = {**made.rank_by_module(), VOCABULARY: 100}
    held = HeldAdapter(1, most, lambda: made, False, None)
    cache.add(held)
    assert cache.fits([held])
    cache.take_copy(1, made)
    assert held.ranks[VOCABULARY] == 3
    placed(cache, 1)
    cache.drop_copy(1)
    assert cache.needs([held]) == made.rank_by_module(), "it has its room, so it is known"
    large = with_head(2, 9)
    cache.add(HeldAdapter(2, large.rank_by_module(), lambda: large, False, large))
    assert not cache.fits([cache[2]])
    assert lack(cache[2].ranks, ROWS)[1] == "--vocabulary-gib"
    assert lack({"q_proj": 17}, ROWS) == ("17 rank rows of q_proj, the arena has 16", "--arena-rows")


def test_one_that_turns_out_to_have_no_vocabulary_takes_its_rows_alone() -> None:
    cache = cache_of()
    made = weights(1, rank=1)
    cache.add(HeldAdapter(1, {**made.rank_by_module(), VOCABULARY: 100}, lambda: made, False, None))
    cache.take_copy(1, made)
    assert cache[1].ranks == {"q_proj": 1, "v_proj": 1}


def test_who_preloads_one_that_turns_out_too_large_is_told_what_it_needs() -> None:
    """Trying again, as one is told to where others are in the way, would never help."""
    harness = Harness()
    harness.engine.cache.allocator.rows[VOCABULARY] = 2
    made = with_head(1, 3)
    most = {**made.rank_by_module(), VOCABULARY: 100}
    harness.engine.add_adapter(HeldAdapter(1, most, lambda: made, False, None))
    with pytest.raises(AdapterUnavailable, match=r"0\.2 MiB .*--vocabulary-gib"):
        harness.engine.preload(1, made)


def test_ranges_name_what_was_written_to_them_wherever_they_move() -> None:
    held = Vocabularies(torch.device("cpu"))
    first, second = (with_head(number, 2).vocabulary for number in (1, 2))
    assert first is not None
    assert second is not None
    held.write(RankRange(0, 2), first)
    held.write(RankRange(3, 2), second)
    assert held.nbytes == first.nbytes + second.nbytes
    held.write(RankRange(1, 2), second)
    assert held.nbytes == second.nbytes * 2
    held.move(RankRange(3, 2), 0)
    assert held.of(RankRange(0, 2)) is second
    assert held.nbytes == second.nbytes
    held.let_go({VOCABULARY: RankRange(0, 2), "q_proj": RankRange(0, 2)})
    assert held.nbytes == 0


class VocabularyArena:
    """Holds vocabularies, as a device's arena does, and nothing else."""

    def __init__(self) -> None:
        self.held = Vocabularies(torch.device("cpu"))

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        self.held.take(ranges, weights.vocabulary)
        yield

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        if module == VOCABULARY:
            self.held.move(source, target_start)
        yield

    def release(self, ranges: AdapterRanges) -> None:
        self.held.let_go(ranges)


def test_one_that_leaves_before_it_was_written_takes_no_others_vocabulary_along() -> None:
    """Its units are in the books its own, while another's vocabulary lies in them until that is moved."""
    cache = cache_of((1, 10), (2, 10), (3, 12), units=25)
    arena = VocabularyArena()
    writer = ArenaWriter(arena, cache, SilentEngineObserver())
    leaving = Leaving(cache, writer.release, lambda _: None)
    for adapter_id in (1, 2):
        writer.add(cache.place({adapter_id}, set()))
    assert not writer.work(math.inf)
    writer.add(cache.place({3}, {2}))
    assert cache.settling == {2, 3}, "nothing had to move: this test proves nothing"
    leaving.remove(3, lambda _: None, 0)
    leaving.release(lambda: {2})
    assert not writer.work(math.inf)
    assert cache.resident({2})
    assert arena.held.of((cache[2].ranges or {})[VOCABULARY]) is weights_of(cache, 2).vocabulary
    leaving.remove(2, lambda _: None, 0)
    leaving.release(set)
    assert arena.held.nbytes == 0, "who leaves as it should gives its memory back at once"


def weights_of(cache: AdapterCache, adapter_id: int) -> AdapterWeights:
    found = cache[adapter_id].weights
    assert found is not None
    return found
