"""Rank rows and tiers: ranges never overlap, what is in use or pinned stays, the host limit holds."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_cache import AdapterCache, ArenaChange, HeldAdapter, Placement, Write
from manylora.server.engine.rank_allocator import Move, RankAllocator, adapter_by_adapter
from manylora.server.kernels.step import RankRange
from tests.server.engine.fakes import FakeArena, weights

ROWS = {"q_proj": 16, "v_proj": 16}
ROW_BYTES = {"q_proj": 8, "v_proj": 8}


def held(adapter_id: int, rank: int = 4, *, pinned: bool = False) -> HeldAdapter:
    made = weights(adapter_id, rank)

    def load_from() -> AdapterWeights:
        return made

    return HeldAdapter(adapter_id, made.rank_by_module(), load_from, pinned, made)


def cache_of(*adapters: HeldAdapter, host_bytes: int = 1 << 20) -> AdapterCache:
    cache = AdapterCache(ROWS, host_bytes, ROW_BYTES)
    for adapter in adapters:
        cache.add(adapter)
    return cache


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=30))
@settings(deadline=None)
def test_ranges_never_overlap_and_compaction_joins_what_is_free(steps: list[tuple[int, int]]) -> None:
    allocator = RankAllocator(ROWS)
    owned: set[int] = set()
    for number, (rank, victim) in enumerate(steps):
        ranks = {"q_proj": rank, "v_proj": 7 - rank}
        if allocator.has_rows(ranks):
            allocator.apply(allocator.plan_compaction(ranks))
            assert not allocator.plan_compaction(ranks)
            allocator.allocate(number, ranks)
            owned.add(number)
        elif owned:
            owned.discard(gone := sorted(owned)[victim % len(owned)])
            allocator.free(gone)
        allocator.check_integrity()
    for number in owned:
        allocator.free(number)
    allocator.check_integrity()
    assert all(allocator.free_rows(module) == rows for module, rows in ROWS.items())


def test_moves_in_order_keep_every_adapters_rows() -> None:
    allocator = RankAllocator({"q_proj": 16})
    rows = np.zeros(16, dtype=np.int64)
    for number, rank in enumerate((3, 4, 2, 5), start=1):
        owned = allocator.allocate(number, {"q_proj": rank})["q_proj"]
        rows[owned.start : owned.start + owned.rank] = number
    allocator.free(1)
    allocator.free(3)
    moves = allocator.plan_compaction({"q_proj": 7})
    for move in moves:
        start, rank = move.source.start, move.source.rank
        rows[move.target_start : move.target_start + rank] = rows[start : start + rank].copy()
    allocator.apply(moves)
    assert rows[:9].tolist() == [2] * 4 + [4] * 5


def moves_of(module: str, adapter_ids: Iterable[int]) -> list[Move]:
    """Adapters' rows, one each, in this order in the module."""
    return [Move(module, i, RankRange(place + 1, 1), place) for place, i in enumerate(adapter_ids)]


@given(st.lists(st.lists(st.integers(1, 6), unique=True), min_size=3, max_size=3))
def test_moves_adapter_by_adapter_keep_the_order_within_each_module(orders: list[list[int]]) -> None:
    """There they build on each other. Modules' orders differ, as those that come later fill different gaps."""
    plan = [move for number, ids in enumerate(orders) for move in moves_of(f"m{number}", ids)]
    moves = adapter_by_adapter(plan)
    assert sorted(moves, key=lambda move: move.module) == plan


def test_adapters_are_whole_again_one_after_the_other_as_far_as_their_order_allows() -> None:
    moves = adapter_by_adapter([*moves_of("q_proj", (1, 2, 3, 4)), *moves_of("v_proj", (3, 1, 4))])
    assert [f"{m.module[0]}{m.adapter_id}" for m in moves] == ["q1", "v3", "v1", "q2", "q3", "q4", "v4"]


def test_no_more_is_moved_than_one_range_needs() -> None:
    """Closing every gap of a module would move all of it for an adapter that fits after the first move."""
    allocator = RankAllocator({"q_proj": 16})
    for number in range(8):
        allocator.allocate(number, {"q_proj": 2})
    for number in (0, 2, 4, 6):
        allocator.free(number)
    assert [move.adapter_id for move in allocator.plan_compaction({"q_proj": 2})] == []
    assert [move.adapter_id for move in allocator.plan_compaction({"q_proj": 4})] == [1]
    assert [move.adapter_id for move in allocator.plan_compaction({"q_proj": 8})] == [1, 3, 5]
    assert [move.adapter_id for move in allocator.plan_compaction({"q_proj": 8}, {1, 3})] == []


def carry_out(cache: AdapterCache, changes: Iterable[ArenaChange], arena: FakeArena | None = None) -> None:
    """Do in the arena what was decided, all of it."""
    for change in changes:
        if arena is not None and isinstance(change, Write):
            arena.write(change.ranges, change.weights)
        elif arena is not None and isinstance(change, Move):
            arena.move(change.module, change.source, change.target_start)
        cache.carried_out(change)


def place(cache: AdapterCache, adapter_ids: set[int], in_use: set[int]) -> None:
    """Put adapters on the device, at once."""
    carry_out(cache, cache.place(adapter_ids, in_use))


def test_what_moves_or_is_written_is_not_on_the_device_until_that_is_done() -> None:
    """Three ranges of each module have to move for the last adapter: nobody else may take them meanwhile."""
    cache = cache_of(held(1, 1), *(held(i, 4) for i in (2, 3, 4)), held(5, 2), held(6, 4), held(7, 4))
    for adapter_id in (1, 2, 3, 4, 5):
        place(cache, {adapter_id}, set())
    cache.remove(1)
    cache.remove(5)
    in_use = {2, 3, 4}
    cost = (3 * 4 + 4) * (8 + 8)  # three are moved and one is written, in both modules
    cache.at_once = cost - 1
    assert cache.can_place({6}, in_use) is Placement.IN_PIECES
    cache.at_once = cost
    assert cache.can_place({6}, in_use) is Placement.LOADABLE
    cache.at_once = math.inf
    assert cache.can_place({6}, in_use) is Placement.LOADABLE
    cache.at_once = 1000
    changes = cache.place({6}, in_use)
    assert cache.at_once == 1000 - cost
    assert [change.adapter_id for change in changes] == [2, 2, 3, 3, 4, 4, 6], (
        "whose rows move waits for others'"
    )
    assert cache.settling == {2, 3, 4, 6}
    assert cache.can_place({7}, set()) is Placement.NO_ROOM, "what settles is in use"
    assert {cache.tier(i) for i in (2, 3, 4, 6)} == {"host"}
    carry_out(cache, changes[:3])
    cache.check_integrity()
    assert [cache.resident({i}) for i in (2, 3, 4, 6)] == [True, False, False, False], (
        "half of 3 is where it was"
    )
    carry_out(cache, changes[3:])
    assert not cache.settling
    assert cache.resident({2, 3, 4, 6})
    cache.check_integrity()


def test_what_settles_is_not_read_again_though_its_host_copy_went() -> None:
    cache = cache_of(held(1), host_bytes=0)
    (write,) = cache.place({1}, set())
    cache.trim_host(set())
    assert cache[1].weights is None
    assert cache.tier(1) == "host", "it is written from a copy that the change holds"
    carry_out(cache, [write])
    assert cache.tier(1) == "device"
    cache.evict(1)
    assert cache.tier(1) == "disk"


def test_what_leaves_the_device_awaits_no_change_any_more() -> None:
    cache = cache_of(held(1), held(2))
    (write,) = cache.place({1}, set())
    assert cache.awaits(write)
    cache.evict(1)
    assert not cache.awaits(write)
    assert not cache.settling
    place(cache, {2}, set())
    (again,) = cache.place({1}, set())
    assert cache.awaits(again)
    assert not cache.awaits(write), "it is another's rows that it would write to"
    cache.check_integrity()


def test_the_longest_unused_makes_room_and_those_in_use_or_pinned_stay() -> None:
    cache = cache_of(held(1, pinned=True), held(2), held(3), held(4), held(5))
    for adapter_id in (1, 2, 3, 4):
        place(cache, {adapter_id}, set())
    cache.touch([2])
    assert cache.can_place({5}, {3}) is Placement.LOADABLE
    place(cache, {5}, {3})
    assert cache.tiers() == {1: "device", 2: "device", 3: "device", 4: "host", 5: "device"}
    assert cache.can_place({4}, {2, 3, 5}) is Placement.NO_ROOM
    cache.check_integrity()


def test_a_set_of_adapters_is_placed_whole_or_not_at_all() -> None:
    cache = cache_of(*(held(i, 8) for i in (1, 2, 3)))
    place(cache, {1}, set())
    assert cache.can_place({2, 3}, {1}) is Placement.NO_ROOM
    assert cache.can_place({2, 3}, set()) is Placement.LOADABLE
    changes = cache.place({2, 3}, set())
    assert {change.adapter_id for change in changes if isinstance(change, Write)} == {2, 3}
    assert cache.tier(1) == "host"
    carry_out(cache, changes)
    cache.evict_all()
    cache.drop_copy(3)
    assert cache.can_place({2, 3}, set()) is Placement.NEEDS_HOST
    assert cache.can_place({2}, set()) is Placement.LOADABLE


def test_others_may_wait_for_rows_of_whom_not_all_are_pinned() -> None:
    cache = cache_of(held(1, pinned=True), held(2))
    assert [cache.evictable(ids) for ids in ({1}, {2}, {1, 2}, set())] == [False, True, True, False]


def test_host_copies_beyond_the_limit_go_but_not_those_about_to_be_used() -> None:
    size = weights(1).nbytes
    cache = cache_of(*(held(i) for i in range(1, 6)), host_bytes=2 * size)
    cache.trim_host({1})
    assert [i for i in range(1, 6) if cache[i].weights is not None] == [1, 5]
    assert cache.host_bytes == 2 * size
    assert cache.can_place({2}, set()) is Placement.NEEDS_HOST
    cache.check_integrity()


def test_one_larger_than_the_arena_never_fits() -> None:
    assert not AdapterCache(ROWS, 0, ROW_BYTES).fits([held(1, 17)])
    assert AdapterCache(ROWS, 0, ROW_BYTES).fits([held(1, 16)])


def test_an_id_is_never_used_again() -> None:
    cache = cache_of(held(1))
    with pytest.raises(AssertionError, match="never used again"):
        cache.add(held(1))


def _lose_host_bytes(cache: AdapterCache) -> None:
    cache.host_bytes -= 1


def _lose_a_copy(cache: AdapterCache) -> None:
    cache[2].weights = None


def _forget_its_ranges(cache: AdapterCache) -> None:
    cache[1].ranges = None


def _await_what_nobody_knows_of(cache: AdapterCache) -> None:
    cache[1].changes.append(Write(1, {}, weights(1)))


def _settle_without_changes(cache: AdapterCache) -> None:
    cache.settling.add(1)


def _write_what_has_no_rows(cache: AdapterCache) -> None:
    cache[2].changes.append(Write(2, {}, weights(2)))
    cache.settling.add(2)


def _give_rows_to_nobody(cache: AdapterCache) -> None:
    cache.allocator.allocate(9, {"q_proj": 4})


@pytest.mark.parametrize(
    "damage",
    [
        _lose_host_bytes,
        _lose_a_copy,
        _forget_its_ranges,
        _await_what_nobody_knows_of,
        _settle_without_changes,
        _write_what_has_no_rows,
        _give_rows_to_nobody,
    ],
)
def test_what_is_wrong_in_the_books_is_found(damage: Callable[[AdapterCache], None]) -> None:
    cache = cache_of(held(1), held(2))
    place(cache, {1}, set())
    cache.check_integrity()
    damage(cache)
    with pytest.raises(AssertionError):
        cache.check_integrity()


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_any_history_keeps_the_books_and_the_arena_whole(data: st.DataObject) -> None:
    pinned = data.draw(st.sets(st.integers(1, 8), max_size=1))
    ranks = {i: data.draw(st.integers(1, 7)) for i in range(1, 9)}
    cache = cache_of(*(held(i, ranks[i], pinned=i in pinned) for i in ranks), host_bytes=200)
    arena = FakeArena(16)
    for _ in range(20):
        ids = data.draw(st.sets(st.integers(1, 8), min_size=1, max_size=2))
        in_use = data.draw(st.sets(st.integers(1, 8), max_size=3))
        before = cache.tiers()
        found = cache.can_place(ids, in_use)
        assert cache.tiers() == before, "a question changed something"
        if found is Placement.NEEDS_HOST:
            for i in ids:
                cache.take_copy(i, weights(i, ranks[i]))
        if found is Placement.LOADABLE:
            carry_out(cache, cache.place(ids, in_use), arena)
            kept = {i for i, tier in before.items() if tier == "device" and i in in_use | pinned | ids}
            assert all(cache.tier(i) == "device" for i in kept | ids)
        cache.touch(ids)
        cache.trim_host(ids)
        cache.check_integrity()
        for i in ranks:
            ranges = cache[i].ranges
            assert ranges is None or arena.value(ranges) == i
