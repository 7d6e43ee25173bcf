"""The engine on a fake model: what a request gets doesn't depend on its company, and every request ends once."""

import pytest
import torch

from manylora.server.engine.request import FinishReason, SamplingParams
from manylora.server.errors import InvalidRequest, ModelNotFound, StepFailed
from tests.server.engine.fakes import VOCAB, Harness, Pools, ask, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
ONE = ((1, 1.0),)
TWO = ((2, 1.0),)
BOTH = ((1, 0.5), (2, 1.0))


def with_adapters(pools: Pools | None = None) -> Harness:
    harness = Harness(pools or Pools())
    harness.know(1)
    harness.know(2, rank=8)
    return harness


def test_a_mixed_batch_gives_each_what_it_gets_alone() -> None:
    harness = with_adapters()
    kinds = {"base": (), "one": ONE, "two": TWO, "both": BOTH}
    for name, adapters in kinds.items():
        harness.engine.add_request(ask(name, PROMPT, 12, adapters))
    harness.run()
    alone = {name: expected(PROMPT, 12, adapters) for name, adapters in kinds.items()}
    assert {name: harness.tokens(name) for name in kinds} == alone
    assert len({tuple(tokens) for tokens in alone.values()}) == 4, "the kinds must differ to prove anything"
    assert harness.model.widest == 4


def test_a_prompt_longer_than_a_step_is_computed_in_chunks_beside_decodes() -> None:
    harness = Harness(Pools(max_step_tokens=8))
    harness.engine.add_request(ask("short", PROMPT[:3], 20))
    harness.step()
    harness.engine.add_request(ask("long", PROMPT * 5, 4))
    harness.step()
    assert len(harness.tokens("short")) == 2, "the decode went on beside the first chunk"
    harness.run()
    assert harness.tokens("long") == expected(PROMPT * 5, 4)
    assert harness.tokens("short") == expected(PROMPT[:3], 20)


def test_preempted_sequences_are_computed_again_and_say_the_same() -> None:
    harness = with_adapters(Pools(blocks=10))
    kinds = {"a": (), "b": ONE, "c": TWO, "d": BOTH}
    for name, adapters in kinds.items():
        harness.engine.add_request(ask(name, PROMPT[:5], 20, adapters))
    harness.run()
    assert harness.engine.preemptions > 0
    for name, adapters in kinds.items():
        assert harness.tokens(name) == expected(PROMPT[:5], 20, adapters)
        assert harness.reason(name) is FinishReason.LENGTH


def test_choices_share_the_prompt_and_each_ends_once() -> None:
    harness = with_adapters()
    harness.engine.add_request(ask("r", PROMPT, 6, ONE, n=3))
    harness.run()
    for index in range(3):
        assert harness.tokens("r", index) == expected(PROMPT, 6, ONE)
        assert harness.reason("r", index) is FinishReason.LENGTH
    cached = {o.index: o.cached_tokens for o in harness.outputs}
    assert cached == {0: 0, 1: 8, 2: 8}
    assert len(harness.observer.ended) == 1


def test_seeded_choices_differ_and_repeat() -> None:
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=8)
    runs = []
    for _ in range(2):
        harness = Harness()
        harness.engine.add_request(ask("r", PROMPT, n=2, sampling=sampling))
        harness.run()
        runs.append((harness.tokens("r", 0), harness.tokens("r", 1)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_the_prefix_cache_serves_the_same_adapter_only() -> None:
    harness = with_adapters()
    for number, adapters in enumerate([ONE, ONE, TWO, (), BOTH, ((1, 0.5),)]):
        harness.engine.add_request(ask(f"r{number}", PROMPT, 3, adapters))
        harness.run()
        assert harness.tokens(f"r{number}") == expected(PROMPT, 3, adapters)
    cached = [harness._of(f"r{number}", 0)[0].cached_tokens for number in range(6)]
    assert cached == [0, 8, 0, 0, 0, 0]


def test_a_name_loaded_again_meets_nothing_of_its_predecessor() -> None:
    harness = with_adapters()
    harness.engine.add_request(ask("old", PROMPT, 3, ONE))
    harness.run()
    harness.engine.remove_adapter(1, lambda freed: None, abort=False)
    harness.know(3)
    harness.engine.add_request(ask("new", PROMPT, 3, ((3, 1.0),)))
    harness.run()
    assert harness._of("new", 0)[0].cached_tokens == 0
    assert harness.tokens("new") == expected(PROMPT, 3, ((3, 1.0),))


def test_prompt_logprobs_cover_the_prompt_whatever_is_cached() -> None:
    harness = Harness(Pools(max_step_tokens=4))
    sampling = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    for name in ("first", "second"):
        harness.engine.add_request(ask(name, PROMPT, sampling=sampling, n=2))
        harness.run()
        for index in range(2):
            reported = harness._of(name, index)[0].prompt_logprobs
            assert reported is not None
            assert reported[0] is None
            assert [each.token_id for each in reported[1:] if each is not None] == PROMPT[1:]


def test_an_abort_frees_everything_before_the_next_step() -> None:
    harness = with_adapters()
    harness.engine.add_request(ask("gone", PROMPT, 50, ONE, n=2))
    harness.engine.add_request(ask("stays", PROMPT, 5, ONE))
    for _ in range(3):
        harness.step()
    held = harness.engine.blocks.num_free
    harness.engine.abort("gone")
    harness.engine.abort("gone")
    assert harness.engine.blocks.num_free > held
    harness.run()
    assert [harness.reason("gone", index) for index in range(2)] == [FinishReason.ABORTED] * 2
    assert harness.tokens("stays") == expected(PROMPT, 5, ONE)


@pytest.mark.parametrize("fault", [RuntimeError("boom"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_fault_in_a_step_fails_its_requests_and_no_others(fault: Exception) -> None:
    harness = with_adapters(Pools(max_running=2))
    for name, adapters in (("a", ONE), ("b", ()), ("c", TWO), ("d", ())):
        harness.engine.add_request(ask(name, PROMPT, 6, adapters))
    harness.step()
    harness.model.fault = lambda tokens: fault
    harness.step()
    harness.model.fault = lambda tokens: None
    assert harness.engine.health.failed_steps == 1
    harness.run()
    assert harness.engine.health.failed_steps == 0
    for name in ("a", "b"):
        assert harness.reason(name) is FinishReason.FAILED
        assert isinstance(harness.error(name), StepFailed)
    assert harness.tokens("c") == expected(PROMPT, 6, TWO)
    assert harness.tokens("d") == expected(PROMPT, 6)


def test_nothing_of_a_failed_step_is_found_in_the_prefix_cache() -> None:
    harness = Harness()
    harness.model.fault = lambda tokens: RuntimeError("boom")
    harness.engine.add_request(ask("fails", PROMPT, 4))
    harness.run()
    harness.model.fault = lambda tokens: None
    harness.engine.add_request(ask("again", PROMPT, 4))
    harness.run()
    assert harness.tokens("again") == expected(PROMPT, 4)


def test_logits_that_are_not_finite_fail_one_request() -> None:
    harness = Harness()
    harness.model.bad = lambda token: token == 63
    harness.engine.add_request(ask("bad", [*PROMPT, 63], 4, n=2))
    harness.engine.add_request(ask("good", PROMPT, 4))
    harness.run()
    assert [harness.reason("bad", index) for index in range(2)] == [FinishReason.FAILED] * 2
    assert harness.tokens("good") == expected(PROMPT, 4)


def test_what_is_not_finite_in_a_chunk_that_samples_nothing_fails_its_request_there() -> None:
    """Its logits are asked of nobody: the activations tell."""
    harness = Harness(Pools(max_step_tokens=8))
    harness.model.overflows = lambda token, mark: token == 63
    harness.engine.add_request(ask("bad", [*PROMPT[:5], 63, *PROMPT * 3], 4))
    harness.step()
    assert harness.reason("bad") is FinishReason.FAILED
    assert "not finite" in str(harness.error("bad"))
    assert harness.model.computed == 8


def test_activations_that_are_not_finite_are_never_found_in_the_prefix_cache() -> None:
    """In a prompt's chunks, in answers, and once the fault is gone the same prompts are computed anew."""
    harness = with_adapters(Pools(max_step_tokens=8))
    long = PROMPT * 3
    harness.model.overflows = lambda token, mark: mark > 0
    for name in ("one", "again"):
        harness.engine.add_request(ask(name, long, 4, ONE))
        harness.run()
        assert harness.reason(name) is FinishReason.FAILED
    assert harness.engine.blocks.num_cached == 0
    harness.model.overflows = lambda token, mark: False
    harness.engine.add_request(ask("healed", long, 4, ONE))
    harness.run()
    assert harness.tokens("healed") == expected(long, 4, ONE)


def test_logits_alone_that_are_not_finite_leave_their_block_out_of_the_cache() -> None:
    harness = Harness()
    harness.model.bad = lambda token: token == 63
    harness.engine.add_request(ask("bad", [*PROMPT[:7], 63], 4))
    harness.run()
    assert harness.reason("bad") is FinishReason.FAILED
    assert harness.engine.blocks.num_cached == 0


def test_prompt_logprobs_that_are_not_finite_fail_their_request() -> None:
    """Though the last token of the prompt has logits that can be sampled."""
    harness = Harness()
    harness.model.bad = lambda token: token == 63
    sampling = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    harness.engine.add_request(ask("bad", [3, 63, 4], sampling=sampling))
    harness.engine.add_request(ask("good", PROMPT, 4))
    harness.run()
    assert harness.reason("bad") is FinishReason.FAILED
    assert harness.tokens("good") == expected(PROMPT, 4)


def test_blocks_that_held_what_was_not_finite_serve_others() -> None:
    """Among others in each step, before and after: they get what they get alone."""
    harness = with_adapters(Pools(blocks=14))
    harness.model.overflows = lambda token, mark: mark == 2000
    for number in range(12):
        harness.engine.add_request(ask(f"bad{number}", PROMPT, 4, TWO))
        harness.engine.add_request(ask(f"base{number}", PROMPT, 4 + number))
        harness.engine.add_request(ask(f"one{number}", [number, *PROMPT], 6, ONE))
        harness.step()
    harness.run()
    for number in range(12):
        assert harness.reason(f"bad{number}") is FinishReason.FAILED
        assert harness.tokens(f"base{number}") == expected(PROMPT, 4 + number)
        assert harness.tokens(f"one{number}") == expected([number, *PROMPT], 6, ONE)


def test_a_prompt_that_is_aborted_halfway_leaves_only_what_was_computed() -> None:
    harness = Harness(Pools(max_step_tokens=8))
    long = PROMPT * 3
    harness.engine.add_request(ask("gone", long, 4))
    harness.step()
    harness.engine.abort("gone")
    assert harness.engine.blocks.num_cached == 2
    harness.engine.add_request(ask("again", long, 4))
    harness.run()
    assert harness.tokens("again") == expected(long, 4)
    assert harness._of("again", 0)[0].cached_tokens == 8


def test_a_fault_in_detokenising_fails_one_request() -> None:
    harness = Harness()
    harness.letters.broken = {expected(PROMPT, 1)[0]}
    harness.engine.add_request(ask("bad", PROMPT, 4))
    other = next(p for p in ([i] for i in range(64)) if harness.letters.broken.isdisjoint(expected(p, 4)))
    harness.engine.add_request(ask("good", [t for t in other if t not in harness.letters.broken], 4))
    harness.run()
    assert harness.reason("bad") is FinishReason.FAILED
    assert harness.tokens("good") == expected(other, 4)


def test_a_prompt_that_the_tokenizer_fails_on_is_told_so() -> None:
    harness = Harness()
    harness.letters.broken = {PROMPT[-1]}
    harness.engine.add_request(ask("bad", PROMPT, 4))
    harness.run()
    assert harness.reason("bad") is FinishReason.FAILED
    assert harness.observer.ended[0].outcome == "failed"


def test_stop_strings_end_the_text_before_them() -> None:
    tokens = expected(PROMPT, 8)
    letters = "".join(chr(65 + token) for token in tokens)
    harness = Harness()
    sampling = SamplingParams(temperature=0.0, max_tokens=8, stop=(letters[3:5],))
    harness.engine.add_request(ask("r", PROMPT, sampling=sampling))
    harness.run()
    assert "".join(o.text for o in harness.outputs) == letters[: letters.index(letters[3:5])]
    assert harness.reason("r") is FinishReason.STOP


def test_what_can_never_run_is_refused_at_the_door() -> None:
    harness = with_adapters(Pools(rows=10))
    check = harness.engine.check
    with pytest.raises(InvalidRequest, match="at least one token"):
        check(ask("r", []))
    with pytest.raises(ModelNotFound):
        check(ask("r", PROMPT, adapters=((9, 1.0),)))
    for wrong in (VOCAB, -1, 1 << 40):
        for request in (
            ask("r", [*PROMPT, wrong]),
            ask("r", PROMPT, sampling=SamplingParams(logit_bias={wrong: 1.0})),
            ask("r", PROMPT, sampling=SamplingParams(stop_token_ids=(3, wrong))),
        ):
            with pytest.raises(InvalidRequest, match=f"id {wrong}, .*vocabulary has {VOCAB} tokens"):
                check(request)
    check(ask("r", [0, VOCAB - 1]))
    with pytest.raises(InvalidRequest, match="rank rows"):
        check(ask("r", PROMPT, adapters=BOTH))
    check(ask("r", PROMPT, adapters=ONE))


def test_timings_of_a_request_are_told_once_and_in_order() -> None:
    harness = Harness()
    harness.engine.add_request(ask("r", PROMPT, 4))
    harness.run()
    (ended,) = harness.observer.ended
    assert ended.outcome == "finished"
    assert ended.queue_seconds is not None
    assert ended.first_token_seconds is not None
    assert 0 <= ended.queue_seconds <= ended.first_token_seconds <= ended.seconds
    assert (ended.prompt_tokens, ended.generated_tokens) == (9, 4)
    assert sum(step.tokens for step in harness.observer.steps) == 9 + 3
