"""How a burst of prompts comes in beside streams: at the pace of all that will run, of which it is as urgent."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from manylora.server.engine.pace import CROWD, WAIT
from manylora.server.engine.prompt_cost import Chunk
from manylora.server.engine.request import GenerationRequest, Pooling
from tests.server.engine.fakes import Harness, Pools, ask

POOLS = Pools(blocks=600, block_size=16, rows=8, max_running=64, max_step_tokens=512)
LONG = 64


def request(name: str, priority: int = 0) -> GenerationRequest:
    prompt = [1 + ord(each) % 60 for each in name.ljust(LONG)]
    return replace(ask(name, prompt, LONG), priority=priority)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    """An engine whose steps take 10 ms, one more for each decode and for each token of a prompt."""
    made = Harness(POOLS)
    pace = made.engine.scheduler.pace
    note = pace.note

    def told(decodes: int, chunks: Sequence[Chunk], seconds: float) -> None:
        note(decodes, chunks, 0.010 + 0.001 * (decodes + sum(length for _, length in chunks)))

    monkeypatch.setattr(pace, "note", told)
    made.engine.add_request(request("warm"))
    made.run()
    return made


def steps_until_together(harness: Harness, count: int) -> int:
    """Run until so many have tokens of theirs in one step; return the number of steps; fails if they never do."""
    for steps in range(1, 1000):
        before = len(harness.outputs)
        harness.step()
        if len({o.request_id for o in harness.outputs[before:] if o.token_ids}) == count:
            return steps
    raise AssertionError("they never ran together")


def test_the_last_of_a_burst_begins_before_its_first_ends(harness: Harness) -> None:
    """Though a step of so many was never measured: else none ever would be."""
    for number in range(32):
        harness.engine.add_request(request(f"r{number}"))
        if number == 3:
            harness.step()
    # A step of all takes 42 ms, so one with prompts 0.7 times 42 tokens at least: 28 prompts of 64 are in soon.
    assert steps_until_together(harness, 32) < 28 * LONG / (0.7 * 42)


def test_what_waits_less_urgently_takes_no_more_of_a_step(harness: Harness) -> None:
    harness.engine.add_request(request("stream"))
    for _ in range(3):
        harness.step()
    for number in range(32):
        harness.engine.add_request(request(f"batch{number}", priority=5))
    before = harness.model.computed
    harness.step()
    assert harness.model.computed - before < 16


Change = Callable[[GenerationRequest], GenerationRequest]


@pytest.mark.parametrize(
    "change",
    [
        lambda it: replace(it, adapters=((7, 1.0),)),
        lambda it: replace(it, prompt_token_ids=it.prompt_token_ids * 100),
        lambda it: replace(it, pooling=Pooling.LAST),
        lambda it: replace(it, sampling=replace(it.sampling, max_tokens=1)),
    ],
    ids=["no rows", "no blocks", "pooled", "one token"],
)
def test_who_will_not_decode_beside_it_makes_no_stream_wait_longer(harness: Harness, change: Change) -> None:
    harness.know(7, cold=True)
    harness.engine.add_request(request("stream"))
    for _ in range(3):
        harness.step()
    for number in range(32):
        harness.engine.add_request(change(request(f"r{number}")))
    harness.engine.add_request(request("other"))
    before = harness.model.computed
    harness.step()
    assert harness.model.computed - before < 16


def test_streams_wait_a_few_steps_for_a_burst_at_most(harness: Harness) -> None:
    harness.engine.add_request(request("stream"))
    for _ in range(3):
        harness.step()
    for number in range(60):
        harness.engine.add_request(request(f"r{number}"))
    before = harness.model.computed
    harness.step()
    # A step of one decode takes 11 ms, a prompt's token 1 ms.
    assert harness.model.computed - before < WAIT * CROWD * 11
