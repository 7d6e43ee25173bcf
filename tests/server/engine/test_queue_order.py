"""Who comes first among those that wait, and what is told or kept only once."""

from dataclasses import replace

import pytest

from manylora.server.engine.request import GenerationRequest, SamplingParams
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


def begun(harness: Harness) -> list[str]:
    """Run everything one at a time; return the ids in the order in which they began."""
    order: list[str] = []
    while len(harness.engine.requests):
        harness.step()
        order += [s.owner.origin for s in harness.engine.scheduler.running if s.owner.origin not in order]
    return order


def of_tenant(name: str, tenant: str, weight: float = 1.0, priority: int = 0) -> GenerationRequest:
    return replace(ask(name, PROMPT, 2), tenant=tenant, weight=weight, priority=priority)


def test_tenants_have_turns_however_many_requests_each_has() -> None:
    harness = Harness(Pools(max_running=1))
    for number in range(6):
        harness.engine.add_request(of_tenant(f"many-{number}", "many"))
    for number in range(2):
        harness.engine.add_request(of_tenant(f"few-{number}", "few"))
    assert begun(harness)[:4] == ["many-0", "few-0", "many-1", "few-1"]


@pytest.mark.parametrize("at_once", [1, 8])
def test_turns_go_by_weight(at_once: int) -> None:
    """Over many steps, and in one that begins several."""
    harness = Harness(Pools(blocks=64, max_running=at_once))
    for number in range(9):
        harness.engine.add_request(of_tenant(f"heavy-{number}", "heavy", weight=3.0))
        harness.engine.add_request(of_tenant(f"light-{number}", "light"))
    assert sum(name.startswith("heavy") for name in begun(harness)[:8]) == 6


def test_who_comes_late_has_saved_no_turns() -> None:
    harness = Harness(Pools(max_running=1))
    for number in range(9):
        harness.engine.add_request(of_tenant(f"early-{number}", "early"))
    while not harness.tokens("early-4"):
        harness.step()
    for number in range(3):
        harness.engine.add_request(of_tenant(f"late-{number}", "late"))
    assert [name.split("-")[0] for name in begun(harness)[-7:-1]] == ["late", "early"] * 3


def test_who_lost_its_place_has_it_again_without_another_turn() -> None:
    harness = Harness(Pools(max_running=1))
    for name in ("a-0", "a-1", "a-2", "b-0", "b-1", "b-2"):
        harness.engine.add_request(of_tenant(name, name[0], priority=5))
    harness.step()
    harness.engine.add_request(of_tenant("urgent", "c"))
    harness.step()
    assert harness.engine.preemptions == 1
    assert not harness.tokens("a-1")
    order = [name for name in begun(harness) if name not in ("a-0", "urgent")]
    assert order == ["b-0", "a-1", "b-1", "a-2", "b-2"]


def test_the_more_urgent_begin_first_and_take_the_place_of_the_less() -> None:
    harness = Harness(Pools(max_running=1))
    harness.engine.add_request(replace(ask("batch", PROMPT, 12), priority=5))
    for _ in range(4):
        harness.step()
    assert harness.tokens("batch")
    harness.engine.add_request(of_tenant("batch-2", "", priority=5))
    harness.engine.add_request(of_tenant("live", ""))
    harness.step()
    assert [s.owner.origin for s in harness.engine.scheduler.running] == ["live"]
    harness.engine.add_request(of_tenant("batch-3", "", priority=5))
    harness.engine.add_request(of_tenant("live-2", ""))
    order = begun(harness)
    assert order == ["live-2", "batch", "batch-2", "batch-3"]
    assert harness.tokens("batch") == expected(PROMPT, 12)


def test_what_one_scope_has_computed_no_other_finds() -> None:
    harness = Harness()
    hits = []
    for number, scope in enumerate(("acme", "globex", "acme", "")):
        harness.engine.add_request(replace(ask(f"r{number}", PROMPT, 2), cache_scope=scope))
        harness.run()
        hits.append(harness.engine.blocks.hit_tokens)
    assert hits[:2] == [0, 0]
    assert hits[2] == hits[3] > 0
