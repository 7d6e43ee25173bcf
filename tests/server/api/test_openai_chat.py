"""Chat completions as the openai client sees them."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.server.api.running import BASE, Running

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "answer"},
    {"role": "user", "content": "hello world"},
]


LETTER_A = str(ord("A") - ord("!"))
"""The alphabet of byte-level BPE starts with "!"."""
END = "319"
"""The end token is the last one."""


def ask(client: openai.OpenAI, model: str = "a", **options: object) -> ChatCompletion:
    given: dict[str, object] = {"max_tokens": 16, "temperature": 0, **options}
    answer = client.chat.completions.create(model=model, messages=MESSAGES, **given)  # type: ignore[call-overload]
    assert isinstance(answer, ChatCompletion)
    return answer


def text_of(answer: ChatCompletion, index: int = 0) -> str:
    text = answer.choices[index].message.content
    assert text is not None
    return text


def streamed(client: openai.OpenAI, n: int = 1, **options: object) -> tuple[list[str], list[str | None]]:
    """Return each choice's text and finish reason, having checked what every chunk must be."""
    texts = [""] * n
    reasons: list[str | None] = [None] * n
    begun = set()
    given: dict[str, object] = {"max_tokens": 16, "temperature": 0, "model": "a", **options}
    with client.chat.completions.create(messages=MESSAGES, stream=True, n=n, **given) as chunks:  # type: ignore[call-overload]
        for chunk in chunks:
            assert chunk.object == "chat.completion.chunk"
            for choice in chunk.choices:
                assert reasons[choice.index] is None, "nothing follows a finish reason"
                if choice.index not in begun:
                    assert choice.delta.role == "assistant"
                    begun.add(choice.index)
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason
    return texts, reasons


def test_an_answer_has_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "a"
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16
    assert len(answer.id) > len("chatcmpl-")


def test_the_base_and_each_adapter_answer_differently(client: openai.OpenAI) -> None:
    answers = {model: text_of(ask(client, model)) for model in (BASE, "a", "b", "c")}
    assert len(set(answers.values())) == 4, answers


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    assert streamed(client) == ([text_of(ask(client))], ["length"])


def test_the_last_chunk_carries_the_usage_if_asked(client: openai.OpenAI) -> None:
    whole = ask(client).usage
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="a",
            messages=MESSAGES,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options=options,  # type: ignore[call-overload]
        )
    )
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert whole is not None
    assert chunks[-1].usage.total_tokens == whole.total_tokens
    assert chunks[-1].usage.completion_tokens == 16


def test_messages_in_parts_and_the_newer_role_mean_the_same(client: openai.OpenAI) -> None:
    parts: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": "answer"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": " world"}]},
    ]
    answer = client.chat.completions.create(model="a", messages=parts, max_tokens=16, temperature=0)
    assert text_of(answer) == text_of(ask(client))


def test_the_model_can_go_on_with_its_own_last_message(client: openai.OpenAI) -> None:
    begun: list[ChatCompletionMessageParam] = [*MESSAGES, {"role": "assistant", "content": "it is"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    answer = client.chat.completions.create(
        model="a", messages=begun, max_tokens=8, temperature=0, extra_body=options
    )
    prompt = (
        "<|im_start|>system\nanswer<|im_end|>\n<|im_start|>user\nhello world<|im_end|>\n"
        "<|im_start|>assistant\nit is"
    )
    plain = client.completions.create(model="a", prompt=prompt, max_tokens=8, temperature=0)
    assert text_of(answer) == plain.choices[0].text


def test_a_stop_string_ends_the_text_and_is_never_seen(client: openai.OpenAI) -> None:
    whole = text_of(ask(client, max_tokens=32))
    for start in range(2, 20, 3):
        stop = whole[start : start + 4]  # most tokens are one or two characters: this spans several
        expected = whole[: whole.index(stop)]
        answer = ask(client, max_tokens=32, stop=[stop, "not in it"])
        assert text_of(answer) == expected
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].model_extra == {"stop_reason": stop}
        assert streamed(client, max_tokens=32, stop=stop) == ([expected], ["stop"])


def test_a_beginning_of_a_stop_string_is_let_out_in_the_end(client: openai.OpenAI) -> None:
    whole = text_of(ask(client))
    assert streamed(client, stop=whole[-3:] + "and more") == ([whole], ["length"])


def test_a_stop_id_ends_the_text(client: openai.OpenAI) -> None:
    stopped = ask(client, logit_bias={LETTER_A: 100}, extra_body={"stop_token_ids": [int(LETTER_A)]})
    assert (text_of(stopped), stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.choices[0].model_extra == {"stop_reason": int(LETTER_A)}


def test_logprobs_are_of_the_tokens_and_add_up(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 16
    spelled = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert spelled.decode("utf-8", "replace") == text_of(answer)
    for entry in logprobs.content:
        top = [each.logprob for each in entry.top_logprobs]
        assert len(top) == 5
        assert top == sorted(top, reverse=True)
        assert sum(map(math.exp, top)) <= 1 + 1e-5
        # Greedy takes the best one.
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)


def test_a_stream_has_the_same_logprobs(client: openai.OpenAI) -> None:
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert whole is not None
    chunks = client.chat.completions.create(
        model="a", messages=MESSAGES, max_tokens=16, temperature=0, stream=True, logprobs=True, top_logprobs=2
    )
    entries = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or []
    ]
    assert [entry.model_dump() for entry in entries] == [entry.model_dump() for entry in whole.content or []]


def test_logprobs_leave_out_the_token_that_ended_the_answer(client: openai.OpenAI) -> None:
    """Tokens join to the text, as OpenAI's do."""
    for end in (LETTER_A, END):
        options: dict[str, Any] = {
            "logprobs": True,
            "logit_bias": {LETTER_A: 100} if end == LETTER_A else {END: 100},
            "extra_body": {"min_tokens": 3, "stop_token_ids": [int(LETTER_A)]} if end == LETTER_A else {},
        }
        answer = ask(client, **options)
        [choice] = answer.choices
        assert choice.finish_reason == "stop"
        assert answer.usage is not None
        assert choice.logprobs is not None
        told = choice.logprobs.content or []
        assert len(told) == (3 if end == LETTER_A else 0)
        spelled = b"".join(bytes(entry.bytes or []) for entry in told)
        assert spelled.decode("utf-8", "replace") == text_of(answer)
        assert answer.usage.completion_tokens == len(told) + 1, "it was made all the same"
        chunks = list(
            client.chat.completions.create(
                model="a", messages=MESSAGES, max_tokens=16, temperature=0, stream=True, **options
            )
        )
        of_chunks = [chunk.choices[0].logprobs for chunk in chunks]
        assert [entry for each in of_chunks if each for entry in each.content or []] == told
        assert of_chunks[-1] is None


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    logprobs = ask(client, logprobs=True).choices[0].logprobs
    assert logprobs is not None
    assert [entry.top_logprobs for entry in logprobs.content or []] == [[]] * 16


def test_four_choices_differ_and_count_the_prompt_once(client: openai.OpenAI) -> None:
    answer = ask(client, n=4, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({text_of(answer, index) for index in range(4)}) == 4
    assert answer.usage is not None
    one = ask(client).usage
    assert one is not None
    assert answer.usage.prompt_tokens == one.prompt_tokens
    assert answer.usage.completion_tokens == 64
    texts, reasons = streamed(client, n=4, temperature=1, seed=5)
    assert texts == [text_of(answer, index) for index in range(4)]
    assert reasons == ["length"] * 4


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(server: Running, client: openai.OpenAI) -> None:
    alone = text_of(ask(client, temperature=1, seed=7))
    assert text_of(ask(client, temperature=1, seed=7)) == alone
    assert text_of(ask(client, temperature=1, seed=8)) != alone

    async def crowd() -> list[str | None]:
        async with server.async_client() as several:
            answers = await asyncio.gather(
                *(
                    several.chat.completions.create(
                        model="abc"[index % 3],
                        messages=MESSAGES,
                        max_tokens=16,
                        temperature=1,
                        seed=7 if index % 3 == 0 else None,
                    )
                    for index in range(12)
                )
            )
        return [answer.choices[0].message.content for answer in answers[::3]]

    assert asyncio.run(crowd()) == [alone] * 4


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    assert len({text_of(ask(client, temperature=1)) for _ in range(3)}) > 1


def test_max_completion_tokens_is_max_tokens_newer_name(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="a", messages=MESSAGES, max_completion_tokens=3, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_without_max_tokens_the_context_is_the_end(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="a",
        messages=[{"role": "user", "content": "0" * 950}],
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024
    assert answer.choices[0].finish_reason == "length"


def test_a_bias_decides_and_an_end_token_ends(client: openai.OpenAI) -> None:
    assert text_of(ask(client, logit_bias={LETTER_A: 100})) == "A" * 16
    ended = ask(client, logit_bias={END: 100})
    assert (text_of(ended), ended.choices[0].finish_reason) == ("", "stop")


def test_min_tokens_holds_the_end_back(client: openai.OpenAI) -> None:
    answer = ask(client, logit_bias={END: 100}, extra_body={"min_tokens": 5})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 10}}],
    ids=lambda penalty: next(iter(penalty)),
)
def test_penalties_make_repeats_rarer(client: openai.OpenAI, penalty: dict[str, object]) -> None:
    def tokens(**more: object) -> list[str]:
        logprobs = ask(client, model="c", max_tokens=48, logprobs=True, **more).choices[0].logprobs
        assert logprobs is not None
        return [entry.token for entry in logprobs.content or []]

    assert len(set(tokens(**penalty))) > len(set(tokens()))


@pytest.mark.parametrize(
    "option", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}]
)
def test_the_narrowest_sampling_is_greedy(client: openai.OpenAI, option: dict[str, object]) -> None:
    assert text_of(ask(client, "a", temperature=1, **option)) == text_of(ask(client))


def test_half_a_character_is_never_streamed(client: openai.OpenAI) -> None:
    """Random bytes are mostly broken characters: each becomes U+FFFD once, as in the whole answer."""
    for seed in range(4):
        whole = ask(client, max_tokens=48, temperature=2, seed=seed)
        texts, _ = streamed(client, max_tokens=48, temperature=2, seed=seed)
        assert texts == [text_of(whole)]


def test_many_at_once_each_get_what_they_get_alone(server: Running, client: openai.OpenAI) -> None:
    alone = {model: text_of(ask(client, model)) for model in (BASE, "a", "b", "c")}
    models = [BASE, "a", "b", "c"] * 4
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda model: text_of(ask(client, model)), models))
    assert answers == [alone[model] for model in models]


def test_the_async_client_streams_too(server: Running, client: openai.OpenAI) -> None:
    async def stream() -> str:
        async with server.async_client() as several:
            chunks = await several.chat.completions.create(
                model="b", messages=MESSAGES, max_tokens=16, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    assert asyncio.run(stream()) == text_of(ask(client, "b"))
