"""Prompts that are pooled and not continued, beside those that are: one queue, one step, one way to end."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from manylora.server.engine.pooling import PooledStates
from manylora.server.engine.request import FinishReason, GenerationRequest, Pooling, SequenceOutput
from manylora.server.errors import InvalidRequest, NotFinite, StepFailed
from tests.server.engine.fakes import Harness, Pools, ask, expected, expected_mean, mark_of, next_logits

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]
ADAPTER = ((1, 1.0),)


def pool(
    name: str,
    prompt: Sequence[int] = PROMPT,
    pooling: Pooling = Pooling.MEAN,
    adapters: Sequence[tuple[int, float]] = (),
) -> GenerationRequest:
    return replace(ask(name, prompt, adapters=adapters), pooling=pooling)


def last_state(prompt: Sequence[int], adapters: Sequence[tuple[int, float]] = ()) -> np.ndarray:
    return next_logits([t + 64 * mark_of(adapters) for t in prompt])


def only(harness: Harness, name: str) -> SequenceOutput:
    [output] = [each for each in harness.outputs if each.request_id == name]
    return output


def vector(harness: Harness, name: str) -> np.ndarray:
    output = only(harness, name)
    assert output.pooled is not None
    return output.pooled


@pytest.mark.parametrize("step_tokens", [1, 2, 3, 7, 32])
def test_a_mean_has_the_same_bits_whatever_the_chunks_are(step_tokens: int) -> None:
    harness = Harness(Pools(max_step_tokens=step_tokens))
    harness.engine.add_request(pool("mean"))
    harness.run()
    assert (vector(harness, "mean") == expected_mean(PROMPT)).all()
    harness.engine.check_integrity()


def test_a_sum_of_many_states_loses_nothing() -> None:
    states = np.random.default_rng(1).normal(1.0, 1.0, (100_000, 2)).astype(np.float32)
    for chunk in (1000, 100_000):
        pooled = PooledStates(Pooling.MEAN)
        for first in range(0, len(states), chunk):
            pooled.add(states[first : first + chunk])
        assert pooled.result() == pytest.approx(states.astype(np.float64).mean(0), rel=1e-7)


def test_the_output_tells_the_prompt_and_nothing_made() -> None:
    harness = Harness()
    harness.engine.add_request(pool("one"))
    harness.run()
    output = only(harness, "one")
    assert output.finish_reason is FinishReason.STOP
    assert (output.prompt_tokens, output.completion_tokens, output.token_ids) == (len(PROMPT), 0, ())
    [ended] = harness.observer.ended
    assert (ended.outcome, ended.prompt_tokens, ended.generated_tokens) == ("finished", len(PROMPT), 0)


def test_the_last_state_may_stand_on_a_prefix_that_is_cached_and_a_mean_may_not() -> None:
    harness = Harness()
    for number in range(2):
        harness.engine.add_request(pool(f"last{number}", pooling=Pooling.LAST))
        harness.engine.add_request(pool(f"mean{number}"))
        harness.run()
    for number in range(2):
        assert (vector(harness, f"last{number}") == last_state(PROMPT)).all()
        assert (vector(harness, f"mean{number}") == expected_mean(PROMPT)).all()
    assert only(harness, "last1").cached_tokens > 0
    assert only(harness, "mean1").cached_tokens == 0


def test_streams_and_pooled_prompts_share_steps_and_neither_feels_the_other() -> None:
    harness = Harness(Pools(max_step_tokens=8))
    harness.know(1)
    harness.engine.add_request(ask("stream", PROMPT, 12))
    harness.step()
    for pooling in Pooling:
        harness.engine.add_request(pool(pooling.value, pooling=pooling, adapters=ADAPTER))
    harness.engine.add_request(ask("other", PROMPT, 6, ADAPTER))
    harness.run()
    assert harness.model.widest > 1
    assert harness.tokens("stream") == expected(PROMPT, 12)
    assert harness.tokens("other") == expected(PROMPT, 6, ADAPTER)
    assert (vector(harness, "mean") == expected_mean(PROMPT, ADAPTER)).all()
    assert (vector(harness, "last") == last_state(PROMPT, ADAPTER)).all()
    harness.engine.check_integrity()


def test_one_that_is_put_back_is_pooled_anew() -> None:
    harness = Harness(Pools(blocks=8, block_size=4, max_step_tokens=10))
    harness.engine.add_request(ask("old", PROMPT[:8], 6))
    harness.engine.add_request(pool("pooled"))
    harness.run()
    assert harness.engine.preemptions == 1
    assert (vector(harness, "pooled") == expected_mean(PROMPT)).all()
    harness.engine.check_integrity()


@pytest.mark.parametrize("step_tokens", [1, 3, 7, 32])
@pytest.mark.parametrize("start", [1, 8, 13, len(PROMPT) - 1])
def test_a_mean_of_the_last_tokens_stands_on_what_is_cached_of_those_before(
    start: int, step_tokens: int
) -> None:
    harness = Harness(Pools(block_size=4, max_step_tokens=step_tokens))
    for name in ("first", "second"):
        harness.engine.add_request(replace(pool(name), pooled_from=start))
        harness.run()
        assert (vector(harness, name) == expected_mean(PROMPT, start=start)).all()
    assert only(harness, "first").cached_tokens == 0
    assert only(harness, "second").cached_tokens == start // 4 * 4
    harness.engine.check_integrity()


def test_one_that_is_put_back_in_mid_count_counts_its_last_tokens_anew() -> None:
    harness = Harness(Pools(blocks=8, block_size=4, max_step_tokens=10))
    harness.engine.add_request(ask("old", PROMPT[:8], 6))
    harness.engine.add_request(replace(pool("pooled"), pooled_from=5))
    harness.run()
    assert harness.engine.preemptions > 0
    assert (vector(harness, "pooled") == expected_mean(PROMPT, start=5)).all()


def test_states_that_are_not_finite_fail_their_own_request_alone() -> None:
    harness = Harness()
    harness.model.overflows = lambda token, mark: token == 63
    harness.model.bad = lambda token: token == 62
    harness.engine.add_request(pool("overflows", [1, 63, 2]))
    harness.engine.add_request(pool("state", [1, 62, 2]))
    harness.engine.add_request(pool("good"))
    harness.engine.add_request(ask("stream", PROMPT, 3))
    harness.run()
    for name in ("overflows", "state"):
        output = only(harness, name)
        assert output.finish_reason is FinishReason.FAILED
        assert isinstance(output.error, NotFinite)
    assert (vector(harness, "good") == expected_mean(PROMPT)).all()
    assert harness.tokens("stream") == expected(PROMPT, 3)
    harness.engine.check_integrity()


def test_a_step_that_fails_and_an_abort_end_a_pooled_prompt_once() -> None:
    harness = Harness(Pools(max_step_tokens=4))
    harness.engine.add_request(pool("gone"))
    harness.step()
    harness.engine.abort("gone")
    harness.model.fault = lambda tokens: RuntimeError("no")
    harness.engine.add_request(pool("failed"))
    harness.run()
    assert only(harness, "gone").finish_reason is FinishReason.ABORTED
    assert isinstance(only(harness, "failed").error, StepFailed)
    harness.engine.check_integrity()


def test_a_prompt_is_pooled_once() -> None:
    with pytest.raises(InvalidRequest, match="n is 1"):
        Harness().engine.check(replace(pool("two"), n=2))


@pytest.mark.parametrize("start", [-1, len(PROMPT)])
def test_states_are_counted_from_one_of_the_prompts_tokens_on(start: int) -> None:
    with pytest.raises(InvalidRequest, match="one of the prompt's tokens"):
        Harness().engine.check(replace(pool("none"), pooled_from=start))
