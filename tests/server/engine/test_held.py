"""Answers held to grammars in the engine, on the fake model: each by its own, with whatever else is asked."""

import re
from dataclasses import replace

import pytest
from llguidance import LLParserLimits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from manylora.server.engine.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarKind,
    Matcher,
    Tables,
    TokenSet,
)
from manylora.server.engine.pace import Allowance
from manylora.server.engine.prompt_cost import PromptCost
from manylora.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from manylora.server.errors import GrammarFailed
from tests.server.engine.fakes import VOCAB, Harness, Pools, ask, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
PIECES = [bytes([65 + token]) for token in range(VOCAB - 2)]
END = VOCAB - 3
"""~, which ends a text."""
TOKENS = TokenSet("letters", PIECES, {}, frozenset({END}))


def held(text: str, tables: Tables | None = None) -> CompiledGrammar:
    return CompiledGrammar(Grammar(GrammarKind.REGEX, text), tables or Tables.of(TOKENS, VOCAB))


def known() -> Tables:
    """Tables of a tokenizer that is known to cut texts into letters."""
    vocabulary = {piece.decode(): token for token, piece in enumerate(PIECES)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return Tables.of(replace(TOKENS, cut=lambda text: made.encode(text).ids), VOCAB)


def request(name: str, grammar: CompiledGrammar | None, **sampling: object) -> GenerationRequest:
    params = SamplingParams(**{"temperature": 1.0, "seed": 7, "max_tokens": 40, **sampling})  # type: ignore[arg-type]
    made = ask(name, PROMPT, 40)
    return replace(made, sampling=params, grammar=grammar, eos_ids=frozenset({END}))


def answer(harness: Harness, name: str, index: int = 0) -> str:
    return "".join(output.text for output in harness._of(name, index))


def run(*requests: GenerationRequest, pools: Pools | None = None) -> Harness:
    harness = Harness(pools or Pools())
    for each in requests:
        harness.engine.add_request(each)
    harness.run()
    return harness


KINDS = [
    {},
    {"temperature": 0.0},
    {"top_k": 3},
    {"top_k": 50, "top_p": 0.8},
    {"top_p": 0.3},
    {"min_p": 0.9},
    {"logit_bias": {0: 100.0, 1: -100.0}},
    {"repetition_penalty": 1.8, "presence_penalty": 2.0, "frequency_penalty": 1.0},
    {"min_tokens": 6},
    {"logprobs": 2},
    {"stop_token_ids": (32,)},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_whatever_else_is_asked_the_answer_is_held(kind: dict[str, object]) -> None:
    harness = run(request("a", held("[B-D]{2,9}x(yz)?"), **kind))
    assert re.fullmatch("[B-D]{2,9}x(yz)?", answer(harness, "a"))
    assert harness.reason("a") is FinishReason.STOP


def test_neighbours_with_other_grammars_and_without_feel_nothing() -> None:
    grammars = {"a": held("[A-F]{12}"), "b": held("[G-L]{12}"), "c": None, "d": held("[a-f]{12}")}
    alone = {
        name: run(request(name, grammar, max_tokens=12)).tokens(name) for name, grammar in grammars.items()
    }
    together = run(*(request(name, grammar, max_tokens=12) for name, grammar in grammars.items()))
    assert together.model.widest == 4
    assert {name: together.tokens(name) for name in grammars} == alone


def test_each_choice_has_its_own_place_in_the_grammar() -> None:
    harness = run(replace(request("a", held("(ab|cd|ef){8}")), n=6))
    texts = [answer(harness, "a", index) for index in range(6)]
    assert all(re.fullmatch("(ab|cd|ef){8}", text) for text in texts)
    assert len(set(texts)) > 1


def test_preempted_answers_go_on_where_they_were() -> None:
    pattern = "([A-F][g-k]){10}"
    names = ["a", "b", "c", "d"]
    calm = {name: run(request(name, held(pattern))).tokens(name) for name in names}
    crowded = run(*(request(name, held(pattern)) for name in names), pools=Pools(blocks=12))
    assert crowded.engine.preemptions > 0
    assert {name: crowded.tokens(name) for name in names} == calm
    assert all(re.fullmatch(pattern, answer(crowded, name)) for name in names)


def test_forced_tokens_take_no_step_and_change_no_answer() -> None:
    pattern = "[A-F]hello[A-F]world{3}[g-k]{2}"
    leapt, told = (
        run(request("a", held(pattern, known()))),
        run(request("a", held(pattern, known()), logprobs=0)),
    )
    assert leapt.tokens("a") == told.tokens("a")
    assert answer(leapt, "a") == answer(told, "a")
    assert re.fullmatch(pattern, answer(leapt, "a"))
    assert len(told.observer.steps) - len(leapt.observer.steps) >= 8
    several = [
        run(replace(request("a", held(pattern, known()), **more), n=3)) for more in ({}, {"logprobs": 0})
    ]
    choices = [[each.tokens("a", index) for index in range(3)] for each in several]
    assert choices[0] == choices[1]
    assert len({tuple(tokens) for tokens in choices[0]}) == 3
    assert choices[0][0] == leapt.tokens("a")
    crowded = run(*(request(name, held(pattern, known())) for name in "abcd"), pools=Pools(blocks=16))
    assert crowded.engine.preemptions > 0
    assert all(crowded.tokens(name) == leapt.tokens("a") for name in "abcd")


def test_forced_tokens_end_with_max_tokens_and_with_stop_texts(caplog: pytest.LogCaptureFixture) -> None:
    cut = run(request("a", held("[A-F]hello", known()), max_tokens=4))
    assert (answer(cut, "a")[1:], cut.reason("a")) == ("hel", FinishReason.LENGTH)
    stopped = run(request("a", held("[A-F]hello", known()), stop=("ll",)))
    assert (answer(stopped, "a")[1:], stopped.reason("a")) == ("he", FinishReason.STOP)
    assert not caplog.records, "it went on after the end"


def scarce(decodes: int, streams: int) -> Allowance:
    """Give what is computed beside decodes six seconds, of which a token takes one."""
    cost = PromptCost()
    cost.note([(0, 100)], 100.0)
    return Allowance(cost, 6.0)


def beside_a_stream(*requests: GenerationRequest, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """Begin them, and a stream that goes on for long."""
    harness = Harness(Pools(blocks=200))
    monkeypatch.setattr(harness.engine.scheduler.pace, "beside_decodes", scarce)
    for each in (*requests, request("stream", None, max_tokens=60)):
        harness.engine.add_request(each)
    harness.step()
    return harness


def test_forced_tokens_wait_for_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    older = replace(ask("prompt", [1] * 200, 1), priority=1)  # it begins after the others nevertheless
    harness = beside_a_stream(older, request("a", held("([A-F]hello){6}", known())), monkeypatch=monkeypatch)
    assert answer(harness, "a")[1:] == "hello"
    for _ in range(5):
        harness.step()
    assert re.fullmatch("([A-F]hello){6}", answer(harness, "a"))
    assert not harness.tokens("prompt")


def test_streams_with_forced_tokens_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request(name, held("([A-F]hello){6}", known())) for name in "ab"]
    harness = beside_a_stream(*asked, monkeypatch=monkeypatch)
    for _ in range(4):
        harness.step()
    assert [len(answer(harness, name)) for name in "ab"] == [18, 18]


def test_the_last_token_has_its_text_and_the_one_that_ends_has_none() -> None:
    whole = run(request("a", held("abc")))
    assert (answer(whole, "a"), whole.tokens("a")) == ("abc", [32, 33, 34])
    ended = run(request("a", held("A*"), logit_bias={END: 100.0}))
    assert (answer(ended, "a"), ended.tokens("a")) == ("", [END])
    for stop in ((), ("never",)):
        kept = run(request("a", held("abc"), stop=stop, stop_token_ids=(34,)))
        assert (answer(kept, "a"), kept.reason("a")) == ("abc", FinishReason.STOP)


def test_a_stop_id_acts_where_the_text_may_end() -> None:
    harness = run(request("a", held("(ab){1,9}c"), stop_token_ids=(32,), logit_bias={32: 100.0}))
    assert answer(harness, "a").startswith("ababababababababab")
    least = run(request("c", held("(ab){3}c"), stop_token_ids=(32,), min_tokens=9))
    assert answer(least, "c") == "abababc"
    ended = run(request("b", held("(ab){1,9}"), stop_token_ids=(32,), logit_bias={32: 100.0}))
    assert answer(ended, "b") == "ab"
    assert ended._of("b", 0)[-1].stop_reason == 32


def test_what_ends_others_goes_on_where_it_is_ignored() -> None:
    harness = run(request("a", held("[A-F]{2,5}"), ignore_eos=True, logit_bias={END: 100.0}))
    assert re.fullmatch("[A-F]{5}", answer(harness, "a"))
    assert harness.reason("a") is FinishReason.STOP


def test_a_fault_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty, sound = held("[A-F]{9}"), held("[A-F]{9}")
    born = CompiledGrammar.matcher

    def matcher(self: CompiledGrammar, ends: frozenset[int], least: int) -> Matcher:
        made = born(self, ends, least)
        if self is faulty:
            made.native.consume_token(60)  # what may not follow: it can't go on
        return made

    monkeypatch.setattr(CompiledGrammar, "matcher", matcher)
    harness = run(request("a", faulty), request("b", sound), request("c", None))
    assert harness.reason("a") is FinishReason.FAILED
    assert isinstance(harness.error("a"), GrammarFailed)
    assert re.fullmatch("[A-F]{9}", answer(harness, "b"))
    assert harness.reason("c") in (FinishReason.STOP, FinishReason.LENGTH)
    assert faulty.broken
    assert not sound.broken
    assert harness.engine.health.trouble is None


def test_a_limit_is_met_by_the_answers_of_one_grammar_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CompiledGrammar.__module__}.limits", lambda: LLParserLimits(max_lexer_states=40))
    ambiguous, sound = held("[AB]*A[AB]{12}C"), held("[A-F]{9}")
    harness = run(request("a", ambiguous), request("b", ambiguous, seed=8), request("c", sound))
    assert isinstance(harness.error("a"), GrammarFailed)
    assert isinstance(harness.error("b"), GrammarFailed)
    assert re.fullmatch("[A-F]{9}", answer(harness, "c"))
    assert ambiguous.broken
    assert not sound.broken


def test_without_a_grammar_nothing_is_held() -> None:
    harness = Harness()
    harness.engine.add_request(ask("a", PROMPT, 12))
    harness.engine.add_request(request("b", held("[A-F]{12}")))
    harness.run()
    assert harness.tokens("a") == expected(PROMPT, 12)
