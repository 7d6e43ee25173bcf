"""The demo's adapter that calls functions, in the loop that programs run with OpenAI's own client."""

import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from manylora.demo.forms import plain
from manylora.demo.heldout_calls import Asked, held_out_questions
from manylora.demo.tables import draw_question, draw_table
from tests.serving import Served, serving

STREAMS = 16
QUESTIONS = 120
MOST_TURNS = 4


@dataclass(frozen=True)
class Talk:
    """How a conversation went: the calls of each turn, and the last words."""

    turns: tuple[tuple[tuple[str, str], ...], ...]
    answer: str

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """All calls, in order."""
        return [(name, json.loads(arguments)) for turn in self.turns for name, arguments in turn]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with serving(tmp_path_factory.mktemp("demo"), "--kv-cache-gib", "0.1") as served:
        yield client_of(served)


@pytest.fixture(scope="module")
def asked() -> tuple[Asked, ...]:
    return tuple(one for one in held_out_questions(count=QUESTIONS) if one.exchange.fits)


@pytest.fixture(scope="module")
def talks(client: openai.OpenAI, asked: tuple[Asked, ...]) -> list[Talk]:
    return talk_all(client, asked)


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def talk_all(client: openai.OpenAI, asked: Sequence[Asked], **more: Any) -> list[Talk]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda one: talk(client, one, **more), asked))


def talk(client: openai.OpenAI, asked: Asked, *, streamed: bool = False, **more: Any) -> Talk:
    """Ask, call what is to be called, tell its result, until there are only words."""
    results = iter([message["content"] for message in asked.messages if message["role"] == "tool"])
    messages: list[Any] = [asked.messages[0]]
    turns: list[tuple[tuple[str, str], ...]] = []
    for _ in range(MOST_TURNS):
        request = {"model": "tools", "messages": messages, "tools": list(asked.tools), **more}
        # The client's own stream puts the pieces together.
        message = _streamed(client, request) if streamed else _whole(client, request)
        if not message.tool_calls:
            return Talk(tuple(turns), message.content or "")
        assert all(call.id for call in message.tool_calls)
        turns.append(tuple((call.function.name, call.function.arguments) for call in message.tool_calls))
        messages.append(message.model_dump(include={"role", "content", "tool_calls"}))
        for call in message.tool_calls:
            result = next(results, "not found")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return Talk(tuple(turns), "")


def _whole(client: openai.OpenAI, request: dict[str, Any]) -> Any:
    choice = client.chat.completions.create(**request, temperature=0, max_tokens=150).choices[0]
    assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
    return choice.message


def _streamed(client: openai.OpenAI, request: dict[str, Any]) -> Any:
    with client.chat.completions.stream(**request, temperature=0, max_tokens=150) as stream:
        return stream.get_final_completion().choices[0].message


def share(right: Sequence[bool]) -> float:
    """The share of what is right."""
    assert right
    return sum(right) / len(right)


def test_the_right_function_is_called_with_the_right_arguments(
    asked: tuple[Asked, ...], talks: list[Talk]
) -> None:
    right = [talk.calls == one.called for one, talk in zip(asked, talks, strict=True)]
    assert share(right) >= 0.9
    several = [ok for ok, one in zip(right, asked, strict=True) if len(one.called) > 1]
    assert share(several) >= 0.8


def test_two_are_called_at_once(asked: tuple[Asked, ...], talks: list[Talk]) -> None:
    at_once = [
        len(talk.turns[0]) == 2
        for one, talk in zip(asked, talks, strict=True)
        if len(one.called) == 2 and talk.turns
    ]
    assert share(at_once) >= 0.75


def test_results_are_told_in_words(asked: tuple[Asked, ...], talks: list[Talk]) -> None:
    told = [
        talk.answer == one.exchange.answer
        for one, talk in zip(asked, talks, strict=True)
        if one.called and talk.calls == one.called
    ]
    assert share(told) >= 0.9


def test_a_streamed_conversation_goes_the_same_way(
    client: openai.OpenAI, asked: tuple[Asked, ...], talks: list[Talk]
) -> None:
    assert talk_all(client, asked[:24], streamed=True) == talks[:24]


def test_one_is_called_where_only_one_may_be(client: openai.OpenAI, asked: tuple[Asked, ...]) -> None:
    two = [one for one in asked if len(one.called) == 2][:16]
    went = talk_all(client, two, parallel_tool_calls=False)
    assert all(len(turn) == 1 for talk in went for turn in talk.turns)
    assert share([talk.calls[:1] == one.called[:1] for talk, one in zip(went, two, strict=True)]) >= 0.75


def test_it_calls_what_it_must(client: openai.OpenAI, asked: tuple[Asked, ...]) -> None:
    for one in asked[:4]:
        message = _whole(client, {**_request(one), "tool_choice": "required"})
        names = {tool["function"]["name"] for tool in one.tools}
        assert {call.function.name for call in message.tool_calls} <= names


def test_it_calls_nothing_where_it_mustn_t(client: openai.OpenAI, asked: tuple[Asked, ...]) -> None:
    for one in asked[:4]:
        assert not _whole(client, {**_request(one), "tool_choice": "none"}).tool_calls


def _request(asked: Asked) -> dict[str, Any]:
    return {"model": "tools", "messages": [asked.messages[0]], "tools": list(asked.tools)}


def test_without_functions_it_answers_as_the_base_does(client: openai.OpenAI) -> None:
    rng = random.Random(5)
    questions = [draw_question(rng, draw_table(rng, held_out=True)) for _ in range(20)]

    def answer(prompt: str) -> str:
        request = {"model": "tools", "messages": [{"role": "user", "content": prompt}]}
        return str(_whole(client, request).content)

    with ThreadPoolExecutor(STREAMS) as pool:
        answers = list(pool.map(answer, [question.prompt for question in questions]))
    assert share([said == plain(one) for said, one in zip(answers, questions, strict=True)]) >= 0.75
