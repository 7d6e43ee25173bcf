"""What is asked about adapters that are on their way, and what is kept of those that have gone."""

from collections.abc import Set

from manylora.server.engine.adapter_cache import Placement
from tests.server.engine.fakes import Harness, Pools, ask, expected

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

    cache.can_place = counted  # type: ignore[method-assign]
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
