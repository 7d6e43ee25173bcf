"""Completions as the openai client sees them: texts, token ids, lists, echo, logprobs."""

import math

import httpx
import openai
import pytest
from openai.types import Completion

from tests.server.api.running import BASE, Running

PROMPT = "the answer is"


def ask(client: openai.OpenAI, prompt: object = PROMPT, **options: object) -> Completion:
    given: dict[str, object] = {"model": "a", "max_tokens": 8, "temperature": 0, **options}
    answer = client.completions.create(prompt=prompt, **given)  # type: ignore[call-overload]
    assert isinstance(answer, Completion)
    return answer


def tokens_of(http: httpx.Client, text: str) -> list[int]:
    answer = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
    found: list[int] = answer.json()["tokens"]
    return found


def streamed(client: openai.OpenAI, prompt: object = PROMPT, **options: object) -> list[str]:
    given: dict[str, object] = {"model": "a", "max_tokens": 8, "temperature": 0, **options}
    texts: dict[int, str] = {}
    for chunk in client.completions.create(prompt=prompt, stream=True, **given):  # type: ignore[call-overload]
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return [texts[index] for index in sorted(texts)]


def test_an_answer_has_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client)
    Completion.model_validate(answer.model_dump(), strict=True)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_sixteen_tokens_are_the_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_a_prompt_may_be_token_ids(client: openai.OpenAI, http: httpx.Client) -> None:
    by_ids = ask(client, tokens_of(http, PROMPT))
    assert by_ids.choices[0].text == ask(client).choices[0].text
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == len(tokens_of(http, PROMPT))


def test_lists_of_prompts_are_answered_in_order(client: openai.OpenAI, http: httpx.Client) -> None:
    prompts = ["one", "two and three", "four"]
    alone = [ask(client, prompt).choices[0].text for prompt in prompts]
    together = ask(client, prompts)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == alone
    by_ids = ask(client, [tokens_of(http, prompt) for prompt in prompts])
    assert [choice.text for choice in by_ids.choices] == alone
    assert streamed(client, prompts) == alone
    assert together.usage is not None
    assert together.usage.completion_tokens == 24
    assert together.usage.prompt_tokens == sum(len(tokens_of(http, prompt)) for prompt in prompts)


def test_choices_of_several_prompts_stand_together(client: openai.OpenAI) -> None:
    options = {"n": 2, "temperature": 1, "seed": 3}
    together = ask(client, ["one", "two"], **options)
    alone = [choice.text for prompt in ("one", "two") for choice in ask(client, prompt, **options).choices]
    assert [choice.text for choice in together.choices] == alone
    assert len(set(alone)) == 4


def test_echo_puts_the_prompt_before_the_text(client: openai.OpenAI, http: httpx.Client) -> None:
    expected = PROMPT + ask(client).choices[0].text
    assert ask(client, echo=True).choices[0].text == expected
    assert ask(client, tokens_of(http, PROMPT), echo=True).choices[0].text == expected
    assert streamed(client, echo=True) == [expected]


def test_echo_alone_scores_the_prompt(client: openai.OpenAI, http: httpx.Client) -> None:
    """max_tokens 0 with echo and logprobs: how evaluation harnesses ask for a text's likelihood."""
    answer = ask(client, PROMPT, echo=True, logprobs=3, max_tokens=0)
    [choice] = answer.choices
    assert choice.text == PROMPT
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (0, answer.usage.prompt_tokens)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    scores: list[float | None] = [*logprobs.token_logprobs]  # openai types them as never null
    assert scores[0] is None
    assert len(logprobs.token_logprobs) == len(tokens_of(http, PROMPT))
    assert all(logprob < 0 for logprob in logprobs.token_logprobs[1:])


def test_logprobs_are_parallel_lists(client: openai.OpenAI) -> None:
    [choice] = ask(client, logprobs=5, echo=True).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    lengths = {len(logprobs.tokens), len(logprobs.top_logprobs), len(logprobs.token_logprobs)}
    assert lengths == {len(logprobs.text_offset)}
    rows = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    for token, logprob, top in list(rows)[1:]:  # nothing predicts the first
        assert top[token] >= logprob
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5


def test_offsets_point_into_the_text(client: openai.OpenAI) -> None:
    """Also where a character has several tokens, whole and streamed."""
    options = {"logprobs": 0, "echo": True, "logit_bias": {"32": 100}, "max_tokens": 4}
    [choice] = ask(client, "wörld 日本", **options).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert choice.text == "wörld 日本AAAA"
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if "\ufffd" not in token:
            assert choice.text[offset : offset + len(token)] == token
    offsets = [
        offset
        for chunk in client.completions.create(  # type: ignore[call-overload]
            model="a", prompt="wörld 日本", temperature=0, stream=True, **options
        )
        for each in chunk.choices
        if each.logprobs
        for offset in each.logprobs.text_offset
    ]
    assert offsets == logprobs.text_offset


def test_the_prompts_logprobs_are_those_of_saying_it(client: openai.OpenAI) -> None:
    """A text that the model said, scored as a prompt, has the logprobs that it had when it was said."""
    bias = {"32": 100}  # "A", which tokenises to itself one by one
    said = ask(client, logprobs=1, logit_bias=bias).choices[0].logprobs
    scored = ask(client, PROMPT + "A" * 8, echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert said is not None
    assert said.tokens == ["A"] * 8
    assert scored is not None
    assert scored.token_logprobs is not None
    assert scored.token_logprobs[-8:] == pytest.approx(said.token_logprobs, abs=1e-4)


def test_a_stop_string_is_not_part_of_the_text(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=24).choices[0].text
    stop = whole[6:9]
    [choice] = ask(client, max_tokens=24, stop=stop).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert streamed(client, max_tokens=24, stop=stop) == [choice.text]


def test_the_stream_ends_with_the_usage_if_asked(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="a",
            prompt=["one", "two"],
            max_tokens=4,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_cached_prompt_tokens_are_reported(client: openai.OpenAI) -> None:
    prompt = "a prompt of more than a block of tokens, asked twice"
    ask(client, prompt)
    usage = ask(client, prompt).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 16 <= cached < usage.prompt_tokens


def test_best_of_passes_where_it_changes_nothing(client: openai.OpenAI) -> None:
    assert ask(client, n=1, best_of=1).choices[0].text == ask(client).choices[0].text


def test_models_are_listed_with_their_parent(server: Running, client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [BASE, "a", "b", "c"]
    parents = [(model.model_extra or {})["parent"] for model in models]
    assert parents == [None, BASE, BASE, BASE]
    assert {model.object for model in models} == {"model"}
    assert client.models.retrieve("a").id == "a"
    assert (client.models.retrieve(BASE).model_extra or {})["max_model_len"] == 1024
