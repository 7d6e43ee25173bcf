"""What is asked about adapters that are on their way, and what is kept of those that have gone."""

from collections.abc import Set

from manylora.server.engine.adapter_cache import Placement
from tests.server.engine.fakes import Harness, Pools, ask, expected, weights

PROMPT = [3, 1, 4, 1, 5]


def test_while_one_is_placed_in_pieces_no_other_is_looked_for_a_place() -> None:
    """Looking takes a millisecond with a thousand adapters on the device, and the answer is known."""
    harness = Harness(Pools(rows=64))
    for adapter_id in range(1, 9):
        harness.know(adapter_id)
    harness.engine.add_request(ask("base", PROMPT, 200))
    harness.step()
    harness.change_the_arena_in_pieces()
    cache, asked = harness.engine.cache, []
    can_place = cache.can_place

    def counted(adapter_ids: Set[int], in_use: Set[int]) -> Placement:
        asked.append(adapter_ids)
        return can_place(adapter_ids, in_use)

    cache.can_place = counted  # type: ignore[method-assign]  # to see what is asked
    for adapter_id in range(1, 9):
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, 3, ((adapter_id, 1.0),)))
    harness.run()
    assert len(asked) == 8, "one for each that was placed"
    for adapter_id in range(1, 9):
        assert harness.tokens(f"r{adapter_id}") == expected(PROMPT, 3, ((adapter_id, 1.0),))


def test_nothing_is_kept_of_a_preload_whose_adapter_was_removed() -> None:
    """Whoever asked for it may have gone, and ids are never used again: nobody would ever fetch it."""
    harness = Harness()
    harness.know(1)
    assert not harness.engine.preload(1, None)
    residency = harness.engine._residency
    assert residency._preloads
    harness.engine.remove_adapter(1, lambda _: None, abort=False)
    assert not residency._preloads


def test_what_somebody_waits_for_may_take_more_of_a_step_than_a_preload() -> None:
    harness = Harness()
    for adapter_id in (1, 2):
        harness.know(adapter_id)
    harness.engine.add_request(ask("base", PROMPT, 60))
    harness.step()
    told: list[bool] = []

    def for_arena(*, awaited: bool) -> float:
        told.append(awaited)
        return 0.0

    harness.engine.scheduler.pace.for_arena = for_arena  # type: ignore[method-assign]  # no time at all
    assert not harness.engine.preload(1, None)
    harness.step()
    assert told == [False]
    while not harness.engine.preload(1, None):
        harness.step()
    told.clear()
    harness.engine.add_request(ask("r", PROMPT, 3, ((2, 1.0),)))
    harness.step()
    assert told == [True, True], "what may be placed, and what is written of it"
    harness.run()


def test_where_nobody_decodes_an_adapter_is_placed_in_the_step_that_it_is_asked_for_in() -> None:
    harness = Harness()
    harness.know(1)
    harness.change_the_arena_in_pieces()
    harness.engine.add_request(ask("base", PROMPT, 3))
    harness.run()
    harness.engine.add_request(ask("r", PROMPT, 3, ((1, 1.0),)))
    harness.step()
    assert harness.tokens("r") == expected(PROMPT, 1, ((1, 1.0),))


def test_what_is_on_the_host_already_is_not_taken_again() -> None:
    harness = Harness()
    harness.know(1)
    before = harness.engine.cache[1].weights
    assert not harness.engine.preload(1, weights(1))
    assert harness.engine.cache[1].weights is before


def test_what_a_request_far_behind_waits_for_stays_on_the_host_once_it_was_read() -> None:
    """Beyond the few that are kept for those whose turn is next: else it would be read again in its turn."""
    harness = Harness(Pools(rows=4, host_bytes=6 * weights(1).nbytes))
    for adapter_id in (5, 1, 2, 3, 4):
        harness.know(adapter_id, cold=True)
    harness.know(6)
    harness.know(7, pinned=True)
    harness.engine.add_request(ask("busy", PROMPT, 20, ((7, 1.0),)))
    harness.step()
    for adapter_id in range(1, 6):
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, 2, ((adapter_id, 1.0),)))
    harness.step()
    harness.finish_loads()
    harness.engine.host_loaded(5, weights(5))
    harness.step()
    on_host = {i for i in range(1, 8) if harness.engine.cache[i].weights is not None}
    assert on_host == {1, 2, 3, 4, 5, 7}


def test_who_begins_in_a_step_keeps_its_adapter_from_whoever_begins_after_it_in_the_same() -> None:
    harness = Harness(Pools(rows=4))
    for adapter_id in (1, 2):
        harness.know(adapter_id)
    harness.preload(1)
    for adapter_id in (1, 2):
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, 3, ((adapter_id, 1.0),)))
    harness.run()
    for adapter_id in (1, 2):
        assert harness.tokens(f"r{adapter_id}") == expected(PROMPT, 3, ((adapter_id, 1.0),))
