"""Prompts whose beginning is the base's, computed while the adapters that act behind it are on their way."""

from collections.abc import Callable

import pytest

from manylora.adapters.errors import InvalidAdapter
from manylora.server.engine.activation import AdapterKey
from manylora.server.engine.request import FinishReason
from manylora.server.errors import AdapterUnavailable
from tests.server.engine.fakes import Harness, Pools, ask, expected

TALK = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
"""Five blocks of four."""
JUDGE = (40, 41)
JUDGED = [*TALK, *JUDGE]
ONE: AdapterKey = ((1, 1.0),)
TWO: AdapterKey = ((2, 1.0),)
RIGHT = expected(JUDGED, 5, ONE, {1: JUDGE})


def judging(pools: Pools | None = None) -> Harness:
    """An engine with an activated adapter, on disk, and two ordinary ones."""
    harness = Harness(pools or Pools())
    harness.know(1, cold=True, invocation=JUDGE)
    harness.know(2)
    harness.know(3)
    return harness


def gone_ahead(harness: Harness, name: str = "judged") -> None:
    """Ask the judge, and compute what can be without it."""
    harness.engine.add_request(ask(name, JUDGED, 5, ONE))
    while harness.step():
        assert harness.model.computed <= len(TALK)
    assert harness.model.computed == len(TALK)


@pytest.mark.parametrize("tokens", [3, 32])
def test_what_is_the_bases_is_computed_while_the_adapter_is_read(tokens: int) -> None:
    harness = judging(Pools(max_step_tokens=tokens, host_bytes=0))
    gone_ahead(harness)
    assert harness.engine.cache.tier(1) == "disk"
    assert [each.adapter_id for each in harness.loads] == [1]
    assert harness.engine.scheduler.next_deadline() is not None, (
        "it may have to be told that it waited too long"
    )
    assert harness.engine.scheduler.in_use() == set()
    harness.run()
    assert harness.tokens("judged") == RIGHT
    assert (harness.reads[1], harness.engine.preemptions) == (1, 0)
    assert harness.model.computed == len(JUDGED) + 4, "a token was computed twice"


def test_what_is_the_bases_is_computed_while_the_adapter_is_written_in_pieces() -> None:
    harness = judging()
    harness.know(4, rank=16, invocation=JUDGE)
    harness.engine.add_request(ask("stream", TALK[:3], 60))
    harness.step()
    harness.change_the_arena_in_pieces()
    harness.engine.add_request(ask("judged", JUDGED, 5, ((4, 1.0),)))
    before = harness.model.computed
    harness.step()
    assert harness.model.computed - before > 1, "the prompt waits"
    assert 0 < harness.arena.pieces < 16
    harness.run()
    assert harness.tokens("judged") == expected(JUDGED, 5, ((4, 1.0),), {4: JUDGE})
    assert harness.tokens("stream") == expected(TALK[:3], 60)


def test_who_finds_no_rows_where_its_adapter_acts_holds_no_blocks() -> None:
    harness = judging(Pools(rows=4))
    gone_ahead(harness)
    free = harness.engine.blocks.num_free
    harness.engine.add_request(ask("stream", TALK[:3], 40, TWO))
    harness.step()
    harness.finish_loads()
    harness.step()
    assert harness.engine.preemptions == 1
    assert [s.owner.request.request_id for s in harness.engine.scheduler.running] == ["stream"]
    assert harness.engine.blocks.num_free > free
    for _ in range(10):
        harness.step()
    assert harness.engine.preemptions == 1, "it went ahead again"
    assert not harness.tokens("judged")
    harness.run()
    assert harness.tokens("judged") == RIGHT
    assert harness.tokens("stream") == expected(TALK[:3], 40, TWO)


def test_who_waits_for_rows_is_passed_by_nobody_who_would_go_ahead() -> None:
    harness = judging(Pools(rows=4))
    harness.engine.add_request(ask("stream", TALK[:3], 20, TWO))
    harness.step()
    harness.engine.add_request(ask("first", TALK[:3], 3, ((3, 1.0),)))
    harness.engine.add_request(ask("judged", JUDGED, 5, ONE))
    for _ in range(5):
        harness.step()
    assert [s.owner.request.request_id for s in harness.engine.scheduler.running] == ["stream"]
    harness.run()
    assert harness.tokens("judged") == RIGHT


def test_it_goes_ahead_in_nobodys_place() -> None:
    """Neither slots nor blocks are taken from who runs for one that would stand still in the end."""
    harness = judging(Pools(blocks=12))
    harness.engine.add_request(ask("stream", TALK, 24, n=2))
    for _ in range(6):
        harness.step()
    assert len(harness.engine.scheduler.running) == 2
    other = [7, *JUDGED]
    harness.engine.add_request(ask("judged", other, 5, ONE))
    harness.step()
    assert len(harness.engine.scheduler.running) == 2
    assert not harness.engine.preemptions
    harness.run()
    assert harness.tokens("judged") == expected(other, 5, ONE, {1: JUDGE})


def test_what_is_cached_needs_no_going_ahead() -> None:
    harness = judging()
    harness.engine.add_request(ask("base", [*TALK, 7], 1))
    harness.run()
    harness.engine.add_request(ask("judged", JUDGED, 5, ONE))
    assert not harness.step()
    assert not harness.engine.scheduler.running
    harness.run()
    assert harness.tokens("judged") == RIGHT


def test_so_many_go_ahead_as_are_read_for() -> None:
    """What they wait for stays on the host, over its limit too: so few of them may be that."""
    harness = Harness(Pools(host_bytes=0))
    for adapter_id in range(1, 9):
        harness.know(adapter_id, cold=True, invocation=JUDGE)
        prompt = [adapter_id, *JUDGED]
        harness.engine.add_request(ask(f"r{adapter_id}", prompt, 3, ((adapter_id, 1.0),)))
    while harness.step():
        pass
    assert len(harness.engine.scheduler.running) == len(harness.loads) == 4
    harness.run()
    for adapter_id in range(1, 9):
        wanted = expected([adapter_id, *JUDGED], 3, ((adapter_id, 1.0),), {adapter_id: JUDGE})
        assert harness.tokens(f"r{adapter_id}") == wanted


def unreadable(harness: Harness) -> None:
    harness.engine.host_loaded(1, InvalidAdapter("cut short"))


def deleted(harness: Harness) -> None:
    gone: list[object] = []
    harness.engine.remove_adapter(1, gone.append, abort=True)
    assert gone


def left(harness: Harness) -> None:
    harness.engine.abort("judged")


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (unreadable, FinishReason.FAILED),
        (deleted, FinishReason.ABORTED),
        (left, FinishReason.ABORTED),
    ],
)
def test_one_that_went_ahead_ends_as_all_that_wait_do(
    event: Callable[[Harness], None], reason: FinishReason
) -> None:
    harness = judging()
    gone_ahead(harness)
    event(harness)
    harness.loads.clear()
    harness.engine.add_request(ask("base", [*TALK, 7], 3))
    harness.run()
    assert harness.reason("judged") is reason
    assert harness.tokens("base") == expected([*TALK, 7], 3)
    assert harness.engine.blocks.num_free == harness.pools.blocks


def test_one_that_went_ahead_waits_no_longer_than_others() -> None:
    harness = judging(Pools(adapter_timeout=0.0))
    harness.engine.add_request(ask("judged", JUDGED, 5, ONE))
    harness.step()
    harness.step()
    harness.step()
    assert harness.reason("judged") is FinishReason.FAILED
    assert isinstance(harness.error("judged"), AdapterUnavailable)
    harness.loads.clear()
    harness.run()


def test_mixtures_that_went_ahead_hold_no_part_while_they_wait_for_another() -> None:
    """Each has one part on the device and lacks the other, for which there is room only where the first's part lies."""
    harness = Harness(Pools(rows=8))
    for adapter_id in (1, 2):
        harness.know(adapter_id)
        harness.preload(adapter_id)
    for adapter_id in (3, 4):
        harness.know(adapter_id, cold=True, invocation=JUDGE)
    # Both parts of each are activated: what comes before is the base's.
    for adapter_id in (5, 6):
        harness.know(adapter_id, invocation=JUDGE)
        harness.preload(adapter_id)
    first, second = ((3, 1.0), (5, 0.5)), ((4, 1.0), (6, 0.5))
    for name, parts in (("first", first), ("second", second)):
        harness.engine.add_request(ask(name, [len(name), *JUDGED], 4, parts))
    while harness.step():
        pass
    assert len(harness.engine.scheduler.running) == 2
    harness.run()
    for name, parts in (("first", first), ("second", second)):
        wanted = expected([len(name), *JUDGED], 4, parts, dict.fromkeys((3, 4, 5, 6), JUDGE))
        assert harness.tokens(name) == wanted
