"""Adapters share the server by tokens: however many ask for one, those that few ask for get as much."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.server.engine import adapter_shares
from manylora.server.engine.adapter_shares import OUTPUT_COST, PROMPT_COST
from manylora.server.engine.request import GenerationRequest
from tests.server.engine.fakes import Harness, Pools, ask, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def of(adapter_id: int, name: str, count: int = 4, share: float = 1.0, tenant: str = "") -> GenerationRequest:
    """A request for one adapter; 0 is the base."""
    adapters = ((adapter_id, 1.0),) if adapter_id else ()
    return replace(ask(name, [adapter_id, *PROMPT], count, adapters), share=share, tenant=tenant)


def begun(harness: Harness, steps: int = 10_000) -> list[str]:
    """Run; return the requests in the order in which they began."""
    order: list[str] = []
    for _ in range(steps):
        if not len(harness.engine.requests):
            break
        harness.step()
        order += [s.owner.origin for s in harness.engine.scheduler.running if s.owner.origin not in order]
    return order


@pytest.mark.parametrize("busy", [0, 1])
def test_ten_times_the_load_of_the_others_takes_nothing_from_them(busy: int) -> None:
    """The busy one's requests are all there first; the base is one among the adapters."""
    harness = Harness(Pools(blocks=200, rows=64, max_running=4, max_step_tokens=64))
    for adapter_id in range(1, 11):
        harness.know(adapter_id)
    for number in range(100):
        harness.engine.add_request(of(busy, f"{busy}-{number}"))
    for number in range(10):
        for adapter_id in range(2, 11):
            harness.engine.add_request(of(adapter_id, f"{adapter_id}-{number}"))
    order = begun(harness)
    first = Counter(name.split("-")[0] for name in order[:60])
    assert max(first.values()) - min(first.values()) <= 2
    assert len(first) == 10
    assert len(order) == 190
    for name in ("2-9", f"{busy}-99"):
        adapter_id = int(name.split("-")[0])
        adapters = ((adapter_id, 1.0),) if adapter_id else ()
        assert harness.tokens(name) == expected([adapter_id, *PROMPT], 4, adapters)


def test_long_answers_count_for_what_they_are() -> None:
    """Turns are by tokens: one whose answers are ten times as long begins more seldom."""
    harness = Harness(Pools(blocks=200, max_running=1))
    for adapter_id, count in ((1, 40), (2, 4)):
        harness.know(adapter_id)
        for number in range(12):
            harness.engine.add_request(of(adapter_id, f"{adapter_id}-{number}", count))
    order = [name.split("-")[0] for name in begun(harness)]
    each = {name: PROMPT_COST * 10 + OUTPUT_COST * count for name, count in (("1", 40), ("2", 4))}
    long = order[:12].count("1")
    assert abs(long * each["1"] - (12 - long) * each["2"]) <= each["1"]


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_weight_is_a_share_of_the_tokens(at_once: int) -> None:
    harness = Harness(Pools(blocks=200, max_running=at_once))
    for adapter_id, share in ((1, 1.0), (2, 3.0)):
        harness.know(adapter_id)
        for number in range(24):
            harness.engine.add_request(of(adapter_id, f"{adapter_id}-{number}", share=share))
    order = begun(harness)
    assert 16 <= sum(name.startswith("2") for name in order[:24]) <= 20


def test_who_waited_for_nothing_has_saved_nothing_up() -> None:
    harness = Harness(Pools(blocks=200, max_running=1))
    for adapter_id in (1, 2):
        harness.know(adapter_id)
    for number in range(12):
        harness.engine.add_request(of(1, f"1-{number}"))
    while not harness.tokens("1-5"):
        harness.step()
    for number in range(5):
        harness.engine.add_request(of(2, f"2-{number}"))
    order = [name[0] for name in begun(harness) if name != "1-5"]
    assert "222" not in "".join(order[:8])
    assert order[:8].count("2") >= 3


def test_a_mixture_shares_as_one_whatever_its_weights() -> None:
    harness = Harness(Pools(blocks=200, max_running=1))
    for adapter_id in (1, 2):
        harness.know(adapter_id)
    for number in range(12):
        mixed = ((1, 1.0 + number / 7), (2, 0.5))
        harness.engine.add_request(ask(f"m-{number}", [*PROMPT, number], 4, mixed))
    for number in range(4):
        harness.engine.add_request(of(1, f"1-{number}"))
    order = [name[0] for name in begun(harness)]
    assert order[:8].count("1") == 4, "each of its weights had a share of its own"


@pytest.mark.parametrize("with_it", [True, False])
def test_nobody_waits_for_an_endless_row_of_newcomers(*, with_it: bool) -> None:
    """Whether they are mixtures with the adapter that waits, each with another one, or adapters that are new."""
    harness = Harness(Pools(blocks=200, rows=400, max_running=1))
    for adapter_id in range(1, 80):
        harness.know(adapter_id, rank=1)
    harness.engine.add_request(of(1, "1-0", 60))
    harness.engine.add_request(of(2, "2-0"))
    while not harness.tokens("1-0"):
        harness.step()
    harness.engine.add_request(of(1, "1-1"))
    came = 0
    while not harness.tokens("1-1"):
        while len(harness.engine.scheduler.waiting) < 3:
            parts = (*(((1, 1.0),) if with_it else ()), (came + 2, 0.01))
            harness.engine.add_request(ask(f"new-{came}", [came % 64, *PROMPT], 4, parts))
            came += 1
        harness.step()
        assert came < 40


def test_mixtures_of_the_same_adapters_have_no_more_than_their_adapters() -> None:
    """However many subsets there are, each is one of its adapters' turns."""
    harness = Harness(Pools(blocks=200, rows=400, max_running=1))
    for adapter_id in range(1, 12):
        harness.know(adapter_id, rank=1)
    for number in range(9):
        harness.engine.add_request(ask(f"m-{number}", [*PROMPT, number], 4, ((1, 1.0), (number + 3, 0.5))))
    for number in range(9):
        harness.engine.add_request(of(2, f"2-{number}"))
    order = [name[0] for name in begun(harness)]
    assert 4 <= order[:10].count("2") <= 6


def test_tenants_have_their_turns_before_adapters_have_theirs() -> None:
    """One tenant's many adapters are no more to another than one."""
    harness = Harness(Pools(blocks=200, max_running=1))
    for adapter_id in range(1, 7):
        harness.know(adapter_id)
        harness.engine.add_request(of(adapter_id, f"many-{adapter_id}", tenant="many"))
    for number in range(3):
        harness.engine.add_request(of(1, f"few-{number}", tenant="few"))
    order = [name.split("-")[0] for name in begun(harness)]
    assert order[:6] in (["many", "few"] * 3, ["few", "many"] * 3)


def test_counters_that_say_nothing_go_and_shares_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many adapters and tenants come by; what they hold is seen nowhere else."""
    monkeypatch.setattr(adapter_shares, "KEPT", 3)
    harness = Harness(Pools(blocks=200, rows=400, max_running=1))
    for adapter_id in range(1, 41):
        harness.know(adapter_id, rank=1)
    for number in range(20):
        harness.engine.add_request(of(1, f"1-{number}"))
    for adapter_id in range(2, 22):
        harness.engine.add_request(of(adapter_id, f"{adapter_id}-0"))
    order = [name.split("-")[0] for name in begun(harness)]
    assert order[:21].count("1") <= 2, "its many pushed others out"
    for adapter_id in range(22, 41):
        harness.engine.add_request(of(adapter_id, f"{adapter_id}-0", tenant=f"of-{adapter_id}"))
        harness.run()
    groups = harness.engine.scheduler.shares._groups
    assert len(groups) <= 4
    assert all(len(each.served) <= 4 for each in groups.values())


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_while_both_wait_what_two_were_served_differs_by_what_runs_at_most(data: st.DataObject) -> None:
    """VTC's bound (2401.00588, theorem 4.4): what those hold that run at once, whoever came first or asks for more."""
    running = data.draw(st.integers(1, 3))
    harness = Harness(Pools(blocks=200, max_running=running, max_step_tokens=data.draw(st.integers(4, 40))))
    shares = {1: 1.0, 2: data.draw(st.sampled_from([1.0, 1.0, 0.5, 2.0]))}
    longest, most = 8, 12
    asked: dict[str, GenerationRequest] = {}
    for adapter_id, count in ((1, data.draw(st.integers(10, 40))), (2, data.draw(st.integers(10, 20)))):
        harness.know(adapter_id)
        for number in range(count):
            name = f"{adapter_id}-{number}"
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=longest))
            made = ask(name, prompt, data.draw(st.integers(1, most)), ((adapter_id, 1.0),))
            asked[name] = replace(made, share=shares[adapter_id])
            harness.engine.add_request(asked[name])
    bound = (running + 1) * (PROMPT_COST * longest + OUTPUT_COST * most) / min(shares.values())
    while True:
        waiting = {s.account for s in harness.engine.scheduler.waiting}
        if len(waiting) < 2:
            break
        harness.step()
        one, two = (_served(harness, asked, shares, each) for each in (1, 2))
        assert abs(one - two) <= bound
    harness.run()


def _served(
    harness: Harness, asked: dict[str, GenerationRequest], shares: dict[int, float], adapter_id: int
) -> float:
    """What an adapter's requests were served by what they were told, prompts counting once they began to answer."""
    told = [o for o in harness.outputs if o.request_id.startswith(f"{adapter_id}-")]
    prompts = sum(
        len(asked[name].prompt_token_ids) - next(o.cached_tokens for o in told if o.request_id == name)
        for name in {o.request_id for o in told}
    )
    tokens = sum(len(o.token_ids) for o in told)
    return (PROMPT_COST * prompts + OUTPUT_COST * tokens) / shares[adapter_id]


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_nobody_is_passed_by_more_than_its_share_lets_pass(data: st.DataObject) -> None:
    """One request of each of a few adapters among a flood for another: each begins before many of the flood do."""
    running = data.draw(st.integers(1, 4))
    harness = Harness(Pools(blocks=200, max_running=running))
    few = data.draw(st.integers(1, 5))
    for adapter_id in range(1, few + 2):
        harness.know(adapter_id)
    flood = data.draw(st.integers(20, 40))
    for number in range(flood):
        harness.engine.add_request(of(1, f"1-{number}"))
    for _ in range(data.draw(st.integers(0, 12))):
        harness.step()
    before = {o.request_id for o in harness.outputs}
    for adapter_id in range(2, few + 2):
        harness.engine.add_request(of(adapter_id, f"{adapter_id}-0"))
    order = [name for name in begun(harness) if name not in before]
    last = max(order.index(f"{adapter_id}-0") for adapter_id in range(2, few + 2))
    assert last <= 2 * running + few
