"""Who could begin now: as far as the blocks go in the order of the queue, and without whoever waits for adapters."""

from manylora.server.engine.crowd import with_room
from tests.server.engine.fakes import Harness, Pools, ask

PROMPT = [3, 1, 4, 1, 5]
"""Two blocks."""


def names(harness: Harness) -> list[str]:
    scheduler, engine = harness.engine.scheduler, harness.engine
    return [s.owner.request.request_id for s in with_room(scheduler.waiting, engine.blocks, engine.cache)]


def test_who_waits_has_room_as_far_as_the_blocks_go() -> None:
    for blocks, found in ((8, ["a", "b", "c"]), (7, ["a", "b"]), (6, ["a", "b"]), (3, ["a"]), (1, [])):
        harness = Harness(Pools(blocks=blocks))
        for adapter_id in (1, 2):
            harness.know(adapter_id)
        harness.preload(1)
        for name, adapters in (("a", ()), ("cold", ((2, 1.0),)), ("b", ((1, 1.0),)), ("c", ())):
            harness.engine.add_request(ask(name, PROMPT, 2, adapters))
        assert names(harness) == found, blocks
