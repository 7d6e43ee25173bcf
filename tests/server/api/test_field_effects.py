"""Every field reaches what it is for, with its whole range; defaults are OpenAI's. No server: bodies are parsed."""

import dataclasses
import json
from typing import Any, cast

import pytest

from manylora.server.api.asks import check_ids, completion_ask, sampling_params
from manylora.server.api.body import parse
from manylora.server.api.choices import Choice
from manylora.server.api.completions import CompletionForm
from manylora.server.api.generation import Generation, usage_of
from manylora.server.api.messages import Message
from manylora.server.api.schemas import ChatRequest, CompletionRequest
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.request import FinishReason, SamplingParams, SequenceOutput
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import ModelText

VOCABULARY = 2000
CHAT: dict[str, object] = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, object] = {"model": "a", "prompt": "x"}


def chat(**fields: object) -> ChatRequest:
    return parse(json.dumps({**CHAT, **fields}).encode(), ChatRequest)


def completion(**fields: object) -> CompletionRequest:
    return parse(json.dumps({**COMPLETION, **fields}).encode(), CompletionRequest)


def sampling(**fields: object) -> SamplingParams:
    body = completion(**fields)
    params = sampling_params(body, body.asked_tokens, body.logprobs)
    check_ids(params, VOCABULARY)
    return params


UNUSUAL: dict[str, object] = {
    "temperature": 0.3,
    "top_p": 0.4,
    "top_k": 5,
    "min_p": 0.6,
    "presence_penalty": 0.7,
    "frequency_penalty": -0.8,
    "repetition_penalty": 1.9,
    "seed": 10,
    "ignore_eos": True,
    "min_tokens": 11,
    "max_tokens": 12,
    "logprobs": 13,
}


def test_every_sampling_field_reaches_the_engine() -> None:
    made = dataclasses.asdict(
        sampling(**UNUSUAL, stop=["a", "b"], stop_token_ids=[14, 15], logit_bias={"16": 1.7})
    )
    plain = dataclasses.asdict(sampling())
    for name, value in UNUSUAL.items():
        assert made[name] == value
        assert plain[name] != value
    assert (made["stop"], made["stop_token_ids"], made["logit_bias"]) == (("a", "b"), (14, 15), {16: 1.7})


def test_defaults_are_openais() -> None:
    plain = sampling()
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (1.0, 1.0, 0, 0.0)
    assert (plain.presence_penalty, plain.frequency_penalty, plain.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (plain.seed, plain.stop, plain.ignore_eos, plain.min_tokens) == (None, (), False, 0)
    assert (plain.max_tokens, plain.logprobs, completion().n) == (16, None, 1)


def test_both_ways_to_say_that_top_k_is_off_are_the_same() -> None:
    assert sampling(top_k=-1).top_k == sampling(top_k=0).top_k == 0


EDGES: list[tuple[str, object, object]] = [
    ("temperature", 2, 2.01),
    ("top_p", 1, 1.01),
    ("top_k", -1, -2),
    ("min_p", 1, 1.01),
    ("presence_penalty", -2, -2.01),
    ("frequency_penalty", 2, 2.01),
    ("repetition_penalty", 10, 10.1),
    ("seed", 2**63 - 1, 2**63),
    ("seed", -(2**63), -(2**63) - 1),
    ("stop", ["x"] * 16, ["x"] * 17),
    ("stop_token_ids", [1] * 1024, [1] * 1025),
    ("logit_bias", {str(n): 100 for n in range(1024)}, {str(n): 100 for n in range(1025)}),
    ("logit_bias", {"1": -100}, {"1": -100.1}),
    ("n", 1, 0),
]


@pytest.mark.parametrize(("field", "last", "beyond"), EDGES, ids=lambda each: str(each)[:20])
def test_a_range_ends_where_the_page_says(field: str, last: object, beyond: object) -> None:
    for body in (chat, completion):
        body(**{field: last})
        with pytest.raises(InvalidRequest) as refused:
            body(**{field: beyond})
        assert str(refused.value.param).startswith(field)


def test_ranges_of_one_kind_of_completion() -> None:
    assert chat(logprobs=True, top_logprobs=20).top_logprobs == 20
    assert completion(logprobs=20).logprobs == 20
    assert completion(prompt=["x"] * 256).num_prompts == 256
    for refused in ({"logprobs": 21}, {"prompt": ["x"] * 257}, {"max_tokens": 0}):
        with pytest.raises(InvalidRequest):
            completion(**refused)
    with pytest.raises(InvalidRequest):
        chat(logprobs=True, top_logprobs=21)
    assert completion(max_tokens=0, echo=True).asked_tokens == 0


def test_token_ids_end_with_the_vocabulary() -> None:
    for field, last, beyond in (
        ("stop_token_ids", [VOCABULARY - 1], [VOCABULARY]),
        ("logit_bias", {str(VOCABULARY - 1): 1}, {str(VOCABULARY): 1}),
    ):
        sampling(**{field: last})
        with pytest.raises(InvalidRequest):
            sampling(**{field: beyond})


def test_as_many_tokens_may_be_the_least_as_are_the_most() -> None:
    assert sampling(min_tokens=4, max_tokens=4).min_tokens == 4
    with pytest.raises(InvalidRequest):
        sampling(min_tokens=5, max_tokens=4)


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=3, max_completion_tokens=5).asked_tokens == 5
    assert chat(max_tokens=3).asked_tokens == 3
    assert chat().asked_tokens is None


def test_usage_is_sent_on_a_stream_only_if_it_is_asked_for() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).wants_usage
    for options in ({"include_usage": False}, {}, None):
        assert not chat(stream=True, stream_options=options).wants_usage


def test_a_message_gives_templates_its_name_and_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = Message.model_validate({"role": "developer", "content": parts, "name": "me"})
    assert message.for_template() == {"role": "system", "content": "ab", "name": "me"}
    assert Message.model_validate({"role": "user", "content": "x"}).for_template() == {
        "role": "user",
        "content": "x",
    }


def generation(body: CompletionRequest, echoed: tuple[str, ...], *prompts: tuple[int, ...]) -> Generation:
    text = ModelText(cast("Any", None), cast("Any", None), cast("Any", None), frozenset())
    ask = completion_ask(body)
    return Generation(cast("Any", None), ask, ResolvedModel((), "a", "a"), text, prompts, echoed)


def output(index: int, prompt: int, completion: int, cached: int) -> SequenceOutput:
    return SequenceOutput(
        request_id="r",
        index=index,
        token_ids=(1,),
        text="x",
        finish_reason=FinishReason.STOP,
        stop_reason="END",
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
    )


def test_a_prompt_counts_once_for_its_choices() -> None:
    """What its first choice found in the prefix cache, not what the others then found of the same prompt."""
    last = [output(0, 10, 1, 0), output(1, 10, 2, 8), output(0, 20, 4, 16), output(1, 20, 8, 18)]
    usage = usage_of([Choice(last=each) for each in last], 2).to_json()
    assert usage == {
        "prompt_tokens": 30,
        "completion_tokens": 15,
        "total_tokens": 45,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


def test_an_echo_alone_ends_by_its_length_whatever_the_token_was_that_nobody_sees() -> None:
    body = completion(max_tokens=0, echo=True)
    form = CompletionForm(generation(body, ("1 2",), (1, 2)), "cmpl-x", 5, echo_only=True)
    choice = Choice()
    choice.add(output(0, 2, 1, 0))
    whole = form.whole([choice], usage_of([choice], 1), at_once=True)
    assert whole["choices"] == [
        {"index": 0, "text": "1 2", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert whole["created"] == 5
    assert whole["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 0,
        "total_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_choices_of_several_prompts_echo_their_own() -> None:
    body = completion(prompt=[[1], [2]], n=2, echo=True)
    form = CompletionForm(generation(body, ("1", "2"), (1,), (2,)), "cmpl-x", 5)
    choices = []
    for index in (0, 1, 0, 1):
        choices.append(Choice())
        choices[-1].add(output(index, 1, 1, 0))
    usage = usage_of(choices, 2)
    texts = [
        each["text"]
        for each in cast("list[dict[str, str]]", form.whole(choices, usage, at_once=True)["choices"])
    ]
    assert texts == ["1x", "1x", "2x", "2x"]
