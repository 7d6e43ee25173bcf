"""Who comes first among those that wait, and what is told or kept only once."""

from manylora.server.engine.request import SamplingParams
from tests.server.engine.fakes import Harness, Pools, ask, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def test_a_smaller_adapter_does_not_pass_one_that_waits_for_rows() -> None:
    harness = Harness(Pools(rows=8))
    for adapter_id, rank in ((1, 4), (2, 8), (3, 4)):
        harness.know(adapter_id, rank)
    harness.engine.add_request(ask("busy", PROMPT, 10, ((1, 1.0),)))
    harness.step()
    harness.engine.add_request(ask("large", PROMPT, 2, ((2, 1.0),)))
    harness.engine.add_request(ask("small", PROMPT, 2, ((3, 1.0),)))
    while harness.engine.requests.get("large") is not None:
        assert not harness.tokens("small")
        harness.step()
    harness.run()


def test_who_was_preempted_goes_on_before_others_begin() -> None:
    harness = Harness(Pools(blocks=10, max_running=3))
    for name in ("a", "b", "c", "late"):
        harness.engine.add_request(ask(name, PROMPT[:5], 20))
    while not harness.tokens("late"):
        harness.step()
    waiting = {sequence.owner.request.request_id for sequence in harness.engine.scheduler.waiting}
    assert harness.engine.preemptions > 0
    assert not waiting
    harness.run()


def test_a_prompt_is_reported_on_once() -> None:
    harness = Harness()
    sampling = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=1)
    harness.engine.add_request(ask("r", PROMPT, sampling=sampling, n=2))
    harness.run()
    for index in range(2):
        told = [o.prompt_logprobs is not None for o in harness.outputs if o.index == index]
        assert told == [True, False, False, False]


def test_four_adapters_are_read_ahead() -> None:
    harness = Harness()
    for adapter_id in range(1, 9):
        harness.know(adapter_id, cold=True)
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, 2, ((adapter_id, 1.0),)))
    harness.step()
    assert {held.adapter_id for held in harness.loads} == {1, 2, 3, 4}
    harness.run()
    assert harness.tokens("r8") == expected(PROMPT, 2, ((8, 1.0),))


def test_nothing_of_a_removed_adapter_stays_in_the_prefix_cache() -> None:
    harness = Harness()
    harness.know(1)
    for name, adapters in (("adapted", ((1, 1.0),)), ("base", ())):
        harness.engine.add_request(ask(name, PROMPT, 2, adapters))
    harness.run()
    before = harness.engine.blocks.num_cached
    harness.engine.remove_adapter(1, lambda freed: None, abort=False)
    assert harness.engine.blocks.num_cached == before // 2 > 0
