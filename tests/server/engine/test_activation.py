"""Adapters that act from an invocation on: before it a sequence is the base's, keys and values too, whoever asked."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.server.engine.activation import AdapterKey, Stages, last_place, stages_of
from manylora.server.engine.request import GenerationRequest, Pooling
from tests.server.engine.fakes import Harness, Pools, ask, expected, expected_mean

TALK = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
"""Twenty tokens of a conversation: five blocks of four."""
JUDGE, SECOND = (40, 41), (50,)
ONE: AdapterKey = ((1, 1.0),)
TWO: AdapterKey = ((2, 1.0),)


def judging(pools: Pools | None = None) -> Harness:
    """An engine with two activated adapters and an ordinary one."""
    harness = Harness(pools or Pools())
    harness.know(1, invocation=JUDGE)
    harness.know(2, invocation=SECOND)
    harness.know(3)
    return harness


def answered(harness: Harness, request: GenerationRequest) -> tuple[list[int], int]:
    """The request's tokens once it has run alone, and how many tokens were computed for it."""
    before = harness.model.computed
    harness.engine.add_request(request)
    harness.run()
    return harness.tokens(request.request_id), harness.model.computed - before


def right(request: GenerationRequest) -> list[int]:
    """What the request's tokens are when it is computed alone, place by place."""
    return expected(
        request.prompt_token_ids, request.sampling.max_tokens, request.adapters, {1: JUDGE, 2: SECOND}
    )


# Where it begins


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_the_last_place_is_the_one_that_looking_at_each_finds(
    prompt: list[int], invocation: list[int]
) -> None:
    places = [i for i in range(len(prompt)) if prompt[i : i + len(invocation)] == invocation]
    assert last_place(prompt, invocation) == (places[-1] if places else None)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.lists(st.sampled_from([(), (1,), (2, 0), (2, 2, 2)]), max_size=4),
)
def test_each_token_has_the_adapters_whose_place_has_come(
    prompt: list[int], invocations: list[tuple[int, ...]]
) -> None:
    adapters = tuple((number + 1, 1.0) for number in range(len(invocations)))
    stages = stages_of(adapters, prompt, lambda each: invocations[each - 1])
    places = {i + 1: last_place(prompt, each) if each else 0 for i, each in enumerate(invocations)}
    later = len(prompt) + 3
    acting = [
        tuple(part for part in adapters if (place := places[part[0]]) is not None and place <= position)
        for position in range(later)
    ]
    assert [stages.at(position) for position in range(later)] == acting
    assert stages.last == acting[-1]
    for start in range(later):
        same = next((i for i in range(start, later) if acting[i] != acting[start]), later)
        assert stages.alike(start, later - start) == same - start
        for end in range(start + 1, later):
            told = stages.within(start, end)
            spread = [key for _, key in told]
            bounds = [*(offset for offset, _ in told), end - start]
            spread = [key for i, key in enumerate(spread) for _ in range(bounds[i], bounds[i + 1])]
            assert spread == acting[start:end]
            assert len(told) == len(set(acting[start:end]))


def test_who_has_no_activated_adapter_has_one_stage() -> None:
    assert stages_of((), TALK, {1: ()}.__getitem__) == Stages.throughout(())
    assert stages_of(ONE, TALK, {1: ()}.__getitem__) == Stages.throughout(ONE)


# What is answered


@pytest.mark.parametrize("tokens", [1, 3, 32])
def test_it_acts_from_its_last_invocation_on_however_the_prompt_is_cut(tokens: int) -> None:
    harness = judging(Pools(max_step_tokens=tokens))
    for number, prompt in enumerate(
        ([*TALK, *JUDGE], [*JUDGE, *TALK, *JUDGE, 7], [*TALK, 7, *JUDGE, 8, 9, 10], [*JUDGE, *TALK])
    ):
        request = ask(f"r{number}", prompt, 6, ONE)
        found, _ = answered(harness, request)
        assert found == right(request)
        assert found != expected(prompt, 6, ONE)[:6] or prompt[:2] == list(JUDGE)


def test_without_its_invocation_it_is_the_base_and_needs_no_rows() -> None:
    harness = judging(Pools(rows=4))
    harness.engine.add_request(ask("holds the rows", TALK, 40, ((3, 1.0),)))
    harness.step()
    harness.engine.add_request(ask("absent", [*TALK, *reversed(JUDGE)], 5, ONE))
    for _ in range(8):
        harness.step()
    assert harness.tokens("absent") == expected([*TALK, *reversed(JUDGE)], 5)
    assert harness.engine.cache.tier(1) == "host"
    harness.run()


def test_an_invocation_that_is_generated_activates_nothing() -> None:
    harness = judging()
    first = expected(TALK, 1)[0]
    harness.know(4, invocation=(first,))
    prompt = [token for token in TALK if token != first]
    found, _ = answered(harness, ask("r", prompt, 8, ((4, 1.0),)))
    assert found == expected(prompt, 8)


def test_all_kinds_are_answered_in_one_batch() -> None:
    harness = judging(Pools(max_step_tokens=11))
    judged = [*TALK, *JUDGE, 7, *SECOND, 8]
    kinds: list[AdapterKey] = [
        (),
        ONE,
        TWO,
        ((3, 1.0),),
        ((1, 0.5), (2, -1.5)),
        ((1, 1.0), (3, 0.25)),
        ((2, 2.0), (3, 1.0)),
    ]
    asked = [ask(f"r{number}", judged, 6, adapters, 2) for number, adapters in enumerate(kinds)]
    for request in asked:
        harness.engine.add_request(request)
        harness.step()
    harness.run()
    for request in asked:
        assert harness.tokens(request.request_id) == harness.tokens(request.request_id, 1) == right(request)
    assert len({tuple(right(request)) for request in asked}) == len(kinds)


def test_a_preempted_one_keeps_its_place_though_it_has_said_the_invocation_itself() -> None:
    harness = judging(Pools(blocks=12))
    said = expected([*TALK, *JUDGE], 4, ONE, {1: JUDGE})
    harness.know(4, invocation=(said[1],))
    harness.engine.add_request(ask("old", TALK, 24))
    prompt = [*(token for token in TALK if token != said[1]), *JUDGE]
    request = ask("young", prompt, 12, ((1, 1.0), (4, 1.0)))
    harness.engine.add_request(request)
    harness.run()
    assert harness.engine.preemptions
    assert harness.tokens("young") == expected(prompt, 12, request.adapters, {1: JUDGE, 4: (said[1],)})


def test_a_mean_is_of_the_base_before_the_invocation() -> None:
    harness = judging()
    for name, prompt, adapters in (("absent", TALK, ONE), ("whole", [*JUDGE, *TALK], ONE)):
        request = replace(ask(name, prompt, 1, adapters), pooling=Pooling.MEAN)
        harness.engine.add_request(request)
        harness.run()
        pooled = next(o.pooled for o in harness.outputs if o.request_id == name)
        assert pooled is not None
        want = expected_mean(prompt, adapters if prompt[:2] == list(JUDGE) else ())
        assert pooled.tolist() == want.tolist()


# What is shared


def test_the_prefill_of_a_conversation_is_computed_once_for_the_base_and_all_who_judge_it() -> None:
    harness = judging()
    _, first = answered(harness, ask("base", [*TALK, 7], 1))
    assert first == len(TALK) + 1
    for name, adapters, prompt in (
        ("one", ONE, [*TALK, *JUDGE]),
        ("two", TWO, [*TALK, *SECOND, 7]),
        ("both", ((1, 1.0), (2, 0.5)), [*TALK, *JUDGE, *SECOND]),
    ):
        request = ask(name, prompt, 3, adapters)
        found, computed = answered(harness, request)
        assert computed == len(prompt) - len(TALK) + 2, "a part of the conversation was computed again"
        assert found == right(request)


def test_the_base_goes_on_from_what_was_computed_for_a_judge() -> None:
    harness = judging()
    answered(harness, ask("one", [*TALK, *JUDGE], 3, ONE))
    found, computed = answered(harness, ask("base", [*TALK, *JUDGE, 7], 3))
    assert found == expected([*TALK, *JUDGE, 7], 3)
    assert computed == 3 + 2


def test_what_was_computed_from_the_invocation_on_is_for_nobody_else() -> None:
    """Blocks that lie behind it and the one in which it begins, at whatever place of a block that is."""
    for cut in range(16, 21):
        harness = judging()
        prompt = [*TALK[:cut], *JUDGE, *SECOND, 11, 12, 13, 14, 15, 16, 17]
        for number, adapters in enumerate(
            (ONE, TWO, (), ((1, 0.5),), ((3, 1.0),), ((1, 1.0), (2, 1.0)), ONE)
        ):
            request = ask(f"r{number}", prompt, 2, adapters)
            assert answered(harness, request)[0] == right(request)


def test_a_later_invocation_makes_a_base_of_what_was_an_adapters() -> None:
    harness = judging()
    turns = [*TALK, *JUDGE, 7, 8, 9, 10, 11, 12]
    request = ask("first", turns, 3, ONE)
    assert answered(harness, request)[0] == right(request)
    # The second begins in the block in which the first began: the same tokens before it, another's from another place.
    near = ask("near", [*TALK, *JUDGE, *JUDGE, 9, 10, 11, 12, 13], 3, ONE)
    assert answered(harness, ask("once", [*TALK, *JUDGE, 40, 42, 9, 10, 11], 3, ONE))[0]
    assert answered(harness, near)[0] == right(near)
    again = ask("again", [*turns, *JUDGE, 14], 3, ONE)
    found, computed = answered(harness, again)
    assert found == right(again)
    assert computed == len(turns) - len(TALK) + 3 + 2, (
        "the base's keys and values were taken from the adapter's"
    )


def test_a_tenants_conversation_is_found_by_no_other() -> None:
    harness = judging()
    prompt = [*TALK, *JUDGE]
    for number, (scope, computed) in enumerate((("", 22), ("a", 22), ("b", 22), ("a", 2), ("", 2))):
        request = replace(ask(f"r{number}", prompt, 1, TWO if number > 2 else ONE), cache_scope=scope)
        # Who has no invocation in the prompt is the base throughout.
        assert answered(harness, request)[1] == computed


def test_what_the_base_shares_outlives_the_adapter() -> None:
    harness = judging()
    answered(harness, ask("one", [*TALK, *JUDGE, 7, 8, 9], 1, ONE))
    cached = harness.engine.blocks.num_cached
    gone: list[object] = []
    harness.engine.remove_adapter(1, gone.append, abort=False)
    assert gone
    assert harness.engine.blocks.num_cached == cached - 1
    harness.engine.check_integrity()
    assert answered(harness, ask("base", [*TALK, 7], 1))[1] == 1
