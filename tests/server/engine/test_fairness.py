"""Clients' requests share queue, slots, blocks and steps: however much one asks for, another doesn't feel it."""

import pytest

from manylora.server.engine.request import FinishReason
from tests.server.engine.fakes import Harness, Pools, ask, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def first_tokens(harness: Harness) -> list[tuple[str, int]]:
    """The choices in the order in which their first tokens came."""
    return list(dict.fromkeys((o.request_id, o.index) for o in harness.outputs))


def ask_prompts(harness: Harness, origin: str, count: int, tokens: int, n: int = 1) -> None:
    """A client's request of several prompts."""
    for number in range(count):
        prompt = [number % 64, *PROMPT]
        harness.engine.add_request(ask(f"{origin}-{number}", prompt, tokens, n=n, origin=origin))


def test_choices_take_turns_with_requests_that_wait() -> None:
    harness = Harness(Pools(max_running=1))
    harness.engine.add_request(ask("many", PROMPT, 2, n=4))
    harness.step()
    for name in ("a", "b", "c"):
        harness.engine.add_request(ask(name, PROMPT[:3], 2))
    for _ in range(3):
        harness.step()
    harness.engine.add_request(ask("d", PROMPT[:3], 2))
    harness.run()
    order = [name if name != "many" else f"many{index}" for name, index in first_tokens(harness)]
    assert order == ["many0", "many1", "a", "b", "c", "many2", "d", "many3"]


def test_choices_wait_for_the_prompt_and_are_made_a_few_at_a_time() -> None:
    harness = Harness(Pools(blocks=400, max_step_tokens=8, max_running=64))
    harness.engine.add_request(ask("many", PROMPT * 3, 200, n=100))
    live = harness.engine.requests.get("many")
    assert live is not None
    for step in range(30):
        harness.step()
        begun = len(harness.engine.scheduler.running)
        if step < 3:
            assert len(live.sequences) == 1, "the prompt isn't computed yet"
        assert len(live.sequences) <= begun + 4
    assert begun > 4
    cached = {o.cached_tokens for o in harness.outputs if o.index}
    assert cached == {24}, "a choice computed what the first one had computed"


def test_a_host_of_choices_is_a_number_until_their_turn_comes() -> None:
    harness = Harness(Pools(blocks=200, max_step_tokens=16))
    ask_prompts(harness, "many", 256, 50, n=128)
    for _ in range(20):
        harness.step()
    made = sum(len(live.sequences) for live in harness.engine.requests)
    assert made < 256 + 100
    assert len(harness.engine.scheduler.waiting) + harness.engine.requests.num_unmade > 32_000
    for number in range(256):
        harness.engine.abort(f"many-{number}")
    harness.step()
    harness.engine.check_integrity()
    assert len(harness.outputs) >= 256 * 128
    assert all(harness.reason(f"many-{number}", 127) is FinishReason.ABORTED for number in (0, 255))


def test_prompts_of_one_request_let_others_in_one_by_one() -> None:
    harness = Harness(Pools(max_running=4, max_step_tokens=12))
    ask_prompts(harness, "many", 30, 1)
    harness.step()
    for name in ("a", "b"):
        harness.engine.add_request(ask(name, PROMPT, 1))
    harness.run()
    place = [name for name, _ in first_tokens(harness)]
    assert place.index("a") < 5
    assert place.index("b") < 5


def test_choices_of_what_has_begun_come_before_the_same_clients_next_prompts() -> None:
    """They hold the adapter that the next prompt waits for, and find their own in the cache."""
    harness = Harness(Pools(rows=4, max_running=1))
    harness.know(1)
    harness.know(2)
    for number, adapters in enumerate([((1, 1.0),), ((2, 1.0),)]):
        harness.engine.add_request(ask(f"r{number}", PROMPT, 1, adapters, n=3, origin="x"))
    harness.run()
    assert first_tokens(harness) == [(f"r{number}", index) for number in range(2) for index in range(3)]
    assert harness.arena.writes == 2


def test_who_runs_nothing_gets_a_slot_from_whoever_has_most() -> None:
    harness = Harness(Pools(blocks=200, max_running=6, max_step_tokens=80))
    harness.engine.add_request(ask("older", PROMPT, 60))
    ask_prompts(harness, "many", 30, 60)
    harness.step()
    assert len(harness.engine.scheduler.running) == 6
    for name in ("a", "b", "c"):
        harness.engine.add_request(ask(name, PROMPT, 5))
    harness.step()
    assert {"a", "b", "c"} <= {name for name, _ in first_tokens(harness)}
    assert harness.engine.preemptions == 3
    harness.run()
    for number in range(30):
        assert harness.tokens(f"many-{number}") == expected([number, *PROMPT], 60)
    assert harness.tokens("older") == expected(PROMPT, 60)
    assert harness.tokens("a") == expected(PROMPT, 5)


def test_who_runs_nothing_gets_blocks_from_whoever_has_most() -> None:
    harness = Harness(Pools(blocks=24, max_running=16))
    ask_prompts(harness, "many", 8, 30)
    for _ in range(6):
        harness.step()
    assert harness.engine.blocks.num_free < 3
    harness.engine.add_request(ask("late", PROMPT, 20))
    steps = 0
    while harness.engine.requests.get("late") is not None:
        steps += 1
        harness.step()
    assert steps <= 21, "it got its blocks at once and kept them"
    assert harness.tokens("late") == expected(PROMPT, 20)
    harness.run()
    for number in range(8):
        assert harness.tokens(f"many-{number}") == expected([number, *PROMPT], 30)


def test_requests_of_one_sequence_each_take_nothing_from_each_other() -> None:
    harness = Harness(Pools(max_running=3))
    for number in range(3):
        harness.engine.add_request(ask(f"r{number}", PROMPT, 20))
    harness.step()
    harness.engine.add_request(ask("late", PROMPT, 2))
    harness.run()
    assert harness.engine.preemptions == 0
    assert first_tokens(harness)[-1] == ("late", 0)


@pytest.mark.parametrize("most", [60, 120])
def test_beside_others_a_request_has_what_the_context_of_a_step_leaves(most: int) -> None:
    harness = Harness(Pools(blocks=400, max_running=64, max_step_tokens=80, max_step_context=most))
    harness.engine.add_request(ask("many", PROMPT * 3, 8, n=20))
    for _ in range(8):
        harness.step()
    for name in ("a", "b"):
        harness.engine.add_request(ask(name, PROMPT[:3], 30))
    harness.step()
    rows = []
    for _ in range(10):
        before = len(harness.outputs)
        harness.step()
        step = [o.request_id for o in harness.outputs[before:]]
        assert step.count("a") == step.count("b") == 1, "a stream missed a step"
        rows.append(step.count("many"))
    assert max(rows) <= max(1, (most - 2 * 4) // 28)
    assert min(rows) >= 1
    harness.run()
    for index in range(20):
        assert harness.tokens("many", index) == expected(PROMPT * 3, 8)


def test_choices_that_share_a_step_go_on_side_by_side() -> None:
    harness = Harness(Pools(blocks=400, max_running=64, max_step_tokens=80, max_step_context=100))
    harness.engine.add_request(ask("other", PROMPT, 100))
    harness.engine.add_request(ask("many", PROMPT * 3, 30, n=8))
    for _ in range(40):
        harness.step()
    counts = [len(harness.tokens("many", index)) for index in range(8)]
    assert min(counts) > 4
    assert max(counts) - min(counts) <= 6, "some choices waited for the others' ends"


def test_every_request_has_one_sequence_in_each_step_whatever_the_context() -> None:
    harness = Harness(Pools(max_step_context=1))
    for number in range(4):
        harness.engine.add_request(ask(f"r{number}", PROMPT, 10, n=2))
    for _ in range(3):
        harness.step()
    for _ in range(5):
        before = len(harness.outputs)
        harness.step()
        assert sorted(o.request_id for o in harness.outputs[before:]) == ["r0", "r1", "r2", "r3"]


def test_a_request_alone_goes_further_and_is_bounded_as_well() -> None:
    harness = Harness(Pools(blocks=800, max_running=64, max_step_tokens=80, max_step_context=100))
    harness.engine.add_request(ask("many", PROMPT * 3, 60, n=40))
    while len(harness.engine.scheduler.running) < 40:
        harness.step()
    before = len(harness.observer.steps)
    for _ in range(5):
        harness.step()
    widths = {step.sequences for step in harness.observer.steps[before:]}
    assert max(widths) <= 4 * 100 // 28
    assert min(widths) > 100 // 28, "no more than it would have beside others"
