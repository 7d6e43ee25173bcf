"""Adapters while the engine runs: cold ones get their turn, removed ones give everything back, faults stay small."""

import pytest

from manylora.adapters.errors import UnsupportedAdapter
from manylora.adapters.types import FreedAdapter
from manylora.server.engine.request import FinishReason
from manylora.server.errors import AdapterUnavailable, ModelNotFound, StepFailed
from tests.server.engine.fakes import Harness, Pools, ask, expected, weights

PROMPT = [3, 1, 4, 1, 5]


def test_a_thousand_adapters_take_turns_in_room_for_sixteen() -> None:
    size = weights(1).nbytes
    harness = Harness(Pools(rows=64, host_bytes=50 * size, max_running=8))
    for adapter_id in range(1, 1001):
        harness.know(adapter_id, cold=adapter_id % 2 == 0)
        assert harness.engine.cache.host_bytes <= 50 * size
    for adapter_id in range(1, 1001):
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, 2, ((adapter_id, 1.0),)))
    harness.run()
    for adapter_id in range(1, 1001):
        assert harness.tokens(f"r{adapter_id}") == expected(PROMPT, 2, ((adapter_id, 1.0),))
    tiers = list(harness.engine.cache.tiers().values())
    assert tiers.count("device") == 16
    assert harness.engine.cache.host_bytes <= 50 * size
    assert max(harness.reads.values()) <= 2, "an adapter was read again and again"


def test_two_requests_for_one_cold_adapter_read_it_once() -> None:
    harness = Harness()
    harness.know(1, cold=True)
    for name in ("a", "b"):
        harness.engine.add_request(ask(name, PROMPT, 3, ((1, 1.0),)))
    for _ in range(3):
        assert not harness.step()
    assert len(harness.loads) == 1
    harness.run()
    assert harness.reads[1] == 1
    assert harness.tokens("a") == harness.tokens("b") == expected(PROMPT, 3, ((1, 1.0),))


def test_others_run_while_an_adapter_is_read() -> None:
    harness = Harness()
    harness.know(1, cold=True)
    harness.engine.add_request(ask("cold", PROMPT, 3, ((1, 1.0),)))
    harness.engine.add_request(ask("base", PROMPT, 3))
    for _ in range(3):
        harness.step()
    assert harness.tokens("base") == expected(PROMPT, 3)
    harness.run()
    assert harness.tokens("cold") == expected(PROMPT, 3, ((1, 1.0),))


def test_a_cold_adapter_is_overtaken_a_bounded_number_of_times() -> None:
    harness = Harness(Pools(rows=8, max_running=4, max_overtakes=5))
    for adapter_id in (1, 2, 3):
        harness.know(adapter_id)
    hot = 0

    def more() -> None:
        nonlocal hot
        hot += 1
        harness.engine.add_request(ask(f"hot{hot}", PROMPT, 4, ((1 + hot % 2, 1.0),)))

    for _ in range(4):
        more()
    harness.step()
    harness.engine.add_request(ask("cold", PROMPT, 4, ((3, 1.0),)))
    before = hot
    for _ in range(100):
        if harness.tokens("cold"):
            break
        more()
        harness.step()
    assert harness.tokens("cold"), "starved"
    begun = {o.request_id for o in harness.outputs} - {f"hot{i}" for i in range(1, before + 1)}
    assert len(begun - {"cold"}) <= 5
    harness.run()


def test_those_who_need_rows_get_them_in_the_order_they_came() -> None:
    harness = Harness(Pools(rows=4, max_running=8))
    for adapter_id in range(1, 7):
        harness.know(adapter_id)
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, 3, ((adapter_id, 1.0),)))
    harness.run()
    first = list(dict.fromkeys(o.request_id for o in harness.outputs))
    assert first == [f"r{i}" for i in range(1, 7)]


def test_a_request_that_waits_too_long_for_rows_gets_a_503() -> None:
    harness = Harness(Pools(rows=4, adapter_timeout=0.0))
    harness.know(1, pinned=True)
    harness.know(2)
    harness.engine.add_request(ask("busy", PROMPT, 20, ((1, 1.0),)))
    harness.step()
    harness.engine.add_request(ask("waits", PROMPT, 3, ((2, 1.0),)))
    harness.step()
    assert harness.engine.scheduler.next_deadline() is not None
    harness.run()
    error = harness.error("waits")
    assert isinstance(error, AdapterUnavailable)
    assert error.status == 503
    assert harness.tokens("busy") == expected(PROMPT, 20, ((1, 1.0),))


def test_files_that_can_not_be_read_fail_those_who_wait_for_them() -> None:
    harness = Harness()
    harness.know(1, cold=True)
    harness.engine.add_request(ask("r", PROMPT, 3, ((1, 1.0),)))
    harness.step()
    harness.engine.host_loaded(harness.loads.pop().adapter_id, OSError("disk"))
    harness.run()
    assert isinstance(harness.error("r"), AdapterUnavailable)


def test_files_that_can_not_be_read_again_fail_nobody_whose_rows_are_there() -> None:
    harness = Harness()
    harness.know(1)
    harness.engine.add_request(ask("runs", PROMPT, 6, ((1, 1.0),)))
    harness.step()
    harness.engine.host_loaded(1, OSError("disk"))
    harness.run()
    assert harness.tokens("runs") == expected(PROMPT, 6, ((1, 1.0),))


def test_a_request_without_the_invocation_needs_nothing_of_its_adapter() -> None:
    """Neither its files, when somebody has them read, nor its rows, when another's are written."""
    harness = Harness()
    for adapter_id, cold in ((1, True), (2, False)):
        harness.know(adapter_id, cold=cold, invocation=(60,))
        harness.engine.add_request(ask(f"base-{adapter_id}", PROMPT, 9, ((adapter_id, 1.0),)))
    harness.engine.host_loaded(1, OSError("disk"))
    harness.step()
    harness.arena.fault = RuntimeError("boom")
    harness.engine.add_request(ask("activated", [60, *PROMPT], 3, ((2, 1.0),)))
    harness.run()
    assert isinstance(harness.error("activated"), StepFailed)
    assert harness.tokens("base-1") == harness.tokens("base-2") == expected(PROMPT, 9)


@pytest.mark.parametrize("asked", [False, True])
def test_what_was_read_for_nobody_pushes_no_copy_out(*, asked: bool) -> None:
    harness = Harness(Pools(host_bytes=weights(1).nbytes))
    harness.know(1, cold=True)
    harness.know(2)
    if asked:
        harness.engine.add_request(ask("r", PROMPT, 3, ((1, 1.0),)))
    harness.engine.host_loaded(1, weights(1))
    harness.step()
    assert (harness.engine.cache[1].weights is None) is not asked
    assert (harness.engine.cache[2].weights is None) is asked


def test_preload_without_room_changes_nothing() -> None:
    harness = Harness(Pools(rows=4))
    harness.know(1, pinned=True)
    harness.know(2)
    harness.engine.add_request(ask("busy", PROMPT, 9, ((1, 1.0),)))
    harness.step()
    with pytest.raises(AdapterUnavailable, match="in use"):
        harness.engine.preload(2, None)
    assert harness.engine.cache.tiers() == {1: "device", 2: "host"}
    harness.run()


def test_one_larger_than_the_arena_is_refused() -> None:
    harness = Harness(Pools(rows=4))
    # Not a 503, which routers repeat for ever: it will never fit.
    with pytest.raises(UnsupportedAdapter, match="arena-rows"):
        harness.know(1, rank=5)
    assert 1 not in harness.engine.cache


def test_a_known_adapter_is_pinned_and_put_on_the_device() -> None:
    harness = Harness(Pools(rows=4))
    harness.know(1)
    harness.know(2, cold=True)
    cache = harness.engine.cache
    assert not harness.engine.preload(2, weights(2)), "it takes a step"
    harness.preload(2)
    harness.engine.pin(2, pinned=True)
    assert (cache.tier(2), cache[2].pinned, cache.tier(1)) == ("device", True, "host")
    with pytest.raises(AdapterUnavailable):
        harness.engine.preload(1, None)
    assert (cache.tier(1), cache[1].pinned) == ("host", False)
    harness.engine.pin(2, pinned=False)
    harness.preload(1)
    assert (cache.tier(1), cache[2].ranges) == ("device", None)
    harness.engine.add_request(ask("r", PROMPT, 3, ((2, 1.0),)))
    harness.run()
    assert harness.tokens("r") == expected(PROMPT, 3, ((2, 1.0),))
    harness.engine.check_integrity()


def test_removing_waits_for_the_running_and_gives_all_back() -> None:
    harness = Harness()
    harness.know(1)
    told: list[FreedAdapter] = []
    harness.engine.add_request(ask("runs", PROMPT, 6, ((1, 1.0),), n=3))
    harness.step()
    harness.engine.remove_adapter(1, told.append, abort=False)
    harness.engine.add_request(ask("late", PROMPT, 6, ((1, 1.0),)))
    harness.step()
    assert not told
    harness.run()
    assert told == [FreedAdapter(rows=8, device_bytes=128, host_bytes=weights(1).nbytes, aborted=0)]
    assert harness.tokens("runs", 2) == expected(PROMPT, 6, ((1, 1.0),))
    assert isinstance(harness.error("late"), ModelNotFound)
    assert 1 not in harness.engine.cache
    assert harness.engine.cache.host_bytes == 0


def test_removing_with_abort_ends_its_requests_and_no_others() -> None:
    harness = Harness()
    harness.know(1)
    told: list[FreedAdapter] = []
    harness.engine.add_request(ask("mine", PROMPT, 6, ((1, 1.0),), n=2))
    harness.engine.add_request(ask("other", PROMPT, 6))
    for _ in range(2):
        harness.step()
    harness.engine.remove_adapter(1, told.append, abort=True)
    assert told[0].aborted == 2
    harness.run()
    assert harness.reason("mine", 1) is FinishReason.ABORTED
    assert harness.tokens("other") == expected(PROMPT, 6)


def test_removing_one_that_is_being_read_is_no_trouble() -> None:
    harness = Harness()
    harness.know(1, cold=True)
    told: list[FreedAdapter] = []
    harness.engine.add_request(ask("r", PROMPT, 3, ((1, 1.0),)))
    harness.step()
    harness.engine.remove_adapter(1, told.append, abort=True)
    assert told
    harness.finish_loads()
    harness.run()
    assert harness.engine.cache.host_bytes == 0


def test_removing_twice_tells_both() -> None:
    harness = Harness()
    harness.know(1)
    told: list[FreedAdapter] = []
    harness.engine.add_request(ask("r", PROMPT, 3, ((1, 1.0),)))
    harness.step()
    for _ in range(2):
        harness.engine.remove_adapter(1, told.append, abort=False)
    harness.run()
    assert len(told) == 2


def test_a_fault_while_writing_an_adapter_fails_its_users_alone() -> None:
    harness = Harness()
    harness.know(1)
    harness.know(2)
    harness.engine.add_request(ask("good", PROMPT, 6, ((2, 1.0),)))
    harness.step()
    harness.arena.fault = RuntimeError("boom")
    harness.engine.add_request(ask("bad", PROMPT, 6, ((1, 1.0),)))
    harness.run()
    assert isinstance(harness.error("bad"), StepFailed)
    assert harness.tokens("good") == expected(PROMPT, 6, ((2, 1.0),))
    harness.engine.add_request(ask("again", PROMPT, 6, ((1, 1.0),)))
    harness.run()
    assert harness.tokens("again") == expected(PROMPT, 6, ((1, 1.0),))


@pytest.mark.parametrize("pinned", [False, True])
def test_rows_are_joined_piece_by_piece_while_others_go_on(pinned: bool) -> None:
    """No step carries out more than a piece; who uses what moves has a pause, and everybody else misses nothing."""
    harness = Harness(Pools(rows=16))
    for adapter_id, rank in ((1, 1), (2, 4), (3, 4), (4, 4), (5, 2), (6, 4)):
        harness.know(adapter_id, rank, pinned=pinned)
    for adapter_id, count in ((1, 1), (2, 60), (3, 60), (4, 60), (5, 1)):
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, count, ((adapter_id, 1.0),)))
    harness.engine.add_request(ask("base", PROMPT, 80))
    harness.step()
    for adapter_id in (1, 5):
        harness.engine.remove_adapter(adapter_id, lambda freed: None, abort=False)
    harness.change_the_arena_in_pieces()
    harness.engine.add_request(ask("waits", PROMPT, 3, ((6, 1.0),)))
    steps = 0
    while not harness.tokens("waits"):
        pieces, told = harness.arena.pieces, len(harness.tokens("base"))
        harness.step()
        steps += 1
        assert harness.arena.pieces - pieces <= 1
        assert len(harness.tokens("base")) == told + 1, "a stream waited for others' rows"
    assert harness.arena.pieces >= 32, "three ranges of two modules were moved, and one written"
    assert 32 <= steps <= 48
    harness.run()
    for adapter_id in (2, 3, 4):
        assert harness.tokens(f"r{adapter_id}") == expected(PROMPT, 60, ((adapter_id, 1.0),))
    assert harness.tokens("waits") == expected(PROMPT, 3, ((6, 1.0),))


def test_a_preload_is_written_piece_by_piece_beside_streams_and_at_once_without() -> None:
    harness = Harness(Pools(rows=16))
    for adapter_id in (1, 2):
        harness.know(adapter_id)
    harness.engine.add_request(ask("base", PROMPT, 40))
    harness.step()
    harness.change_the_arena_in_pieces()
    calls = 0
    while not harness.engine.preload(1, None):
        calls += 1
        before = harness.arena.pieces
        harness.step()
        assert harness.arena.pieces - before <= 1
    assert calls >= 8, "two modules of four rows"
    assert len(harness.tokens("base")) == calls + 1, "a stream waited for what nobody waits for"
    harness.run()
    assert not harness.engine.preload(2, None)
    harness.step()
    assert harness.engine.preload(2, None)
    harness.engine.add_request(ask("r", PROMPT, 3, ((1, 1.0),)))
    harness.run()
    assert harness.tokens("r") == expected(PROMPT, 3, ((1, 1.0),))


def test_one_that_is_removed_while_it_is_written_leaves_the_rows_to_the_next() -> None:
    harness = Harness(Pools(rows=4))
    for adapter_id in (1, 2):
        harness.know(adapter_id)
    harness.engine.add_request(ask("base", PROMPT, 60))
    harness.step()
    harness.change_the_arena_in_pieces()
    assert not harness.engine.preload(1, None)
    for _ in range(3):
        harness.step()
    harness.engine.remove_adapter(1, lambda freed: None, abort=False)
    with pytest.raises(AdapterUnavailable, match="deleted"):
        harness.engine.preload(1, None)
    harness.engine.add_request(ask("r", PROMPT, 3, ((2, 1.0),)))
    harness.run()
    assert harness.tokens("r") == expected(PROMPT, 3, ((2, 1.0),))


@pytest.mark.parametrize("awaited", [False, True])
def test_a_fault_while_one_is_written_in_pieces_is_told_to_whoever_waits_for_it(awaited: bool) -> None:
    harness = Harness()
    harness.know(1)
    harness.engine.add_request(ask("base", PROMPT, 30))
    harness.step()
    harness.change_the_arena_in_pieces()
    harness.arena.fault = RuntimeError("boom")
    if awaited:
        harness.engine.add_request(ask("bad", PROMPT, 6, ((1, 1.0),)))
        harness.run()
        assert isinstance(harness.error("bad"), StepFailed)
    else:
        assert not harness.engine.preload(1, None)
        harness.step()
        with pytest.raises(AdapterUnavailable, match="could not be copied"):
            harness.engine.preload(1, None)
    harness.preload(1)
    harness.engine.add_request(ask("again", PROMPT, 6, ((1, 1.0),)))
    harness.run()
    assert harness.tokens("again") == expected(PROMPT, 6, ((1, 1.0),))
    assert harness.tokens("base") == expected(PROMPT, 30)


def test_a_fault_while_moving_rows_empties_the_device_and_goes_on() -> None:
    harness = Harness(Pools(rows=12))
    for adapter_id, rank in ((1, 4), (2, 4), (3, 4), (4, 8)):
        harness.know(adapter_id, rank)
    harness.engine.add_request(ask("second", PROMPT, 1, ((1, 1.0),)))
    harness.engine.add_request(ask("middle", PROMPT, 9, ((2, 1.0),)))
    harness.engine.add_request(ask("third", PROMPT, 1, ((3, 1.0),)))
    harness.step()
    harness.arena.fault = RuntimeError("boom")
    harness.engine.add_request(ask("wide", PROMPT, 3, ((4, 1.0),)))
    harness.run()
    assert isinstance(harness.error("middle"), StepFailed)
    for name, adapter_id in (("m", 2), ("w", 4)):
        harness.engine.add_request(ask(name, PROMPT, 3, ((adapter_id, 1.0),)))
        harness.run()
        assert harness.tokens(name) == expected(PROMPT, 3, ((adapter_id, 1.0),))


def test_an_adapter_that_is_to_rest_does_so_once_nobody_uses_it() -> None:
    harness = Harness()
    harness.know(1, pinned=True)
    harness.engine.add_request(ask("running", PROMPT, 6, ((1, 1.0),)))
    harness.step()
    harness.engine.rest_adapter(1)
    assert not harness.engine.cache[1].pinned
    assert harness.engine.cache.tier(1) == "device", "a request runs on it"
    harness.run()
    assert harness.tokens("running") == expected(PROMPT, 6, ((1, 1.0),))
    assert harness.engine.cache.tier(1) == "disk"
    assert harness.engine.cache.host_bytes == 0
    for name in ("again", "and again"):
        harness.engine.add_request(ask(name, PROMPT, 6, ((1, 1.0),)))
        harness.run()
        assert harness.tokens(name) == expected(PROMPT, 6, ((1, 1.0),))
        assert harness.engine.cache.tier(1) == "device", (
            "who asks for it has it loaded, and it stays as others do"
        )
        harness.engine.check_integrity()
        harness.engine.rest_adapter(1)
        harness.step()
        assert harness.engine.cache.tier(1) == "disk"


def test_one_that_is_removed_before_it_could_rest_tells_all_that_it_gave_back() -> None:
    harness = Harness()
    harness.know(1)
    told: list[FreedAdapter] = []
    harness.engine.add_request(ask("running", PROMPT, 6, ((1, 1.0),)))
    harness.step()
    harness.engine.rest_adapter(1)
    harness.engine.remove_adapter(1, told.append, abort=False)
    harness.run()
    assert told == [FreedAdapter(rows=8, device_bytes=128, host_bytes=weights(1).nbytes, aborted=0)]


def test_an_adapter_that_is_wanted_again_does_not_rest() -> None:
    harness = Harness()
    harness.know(1)
    harness.engine.add_request(ask("running", PROMPT, 6, ((1, 1.0),)))
    harness.step()
    harness.engine.rest_adapter(1)
    harness.engine.pin(1, pinned=False)
    harness.run()
    assert harness.engine.cache.tier(1) == "device"
