"""Anthropic's client's usual program: messages, streams, tools, JSON by a schema."""

from collections.abc import Callable
from typing import Any

import anthropic

from tests.clients.programs.crew import LOOK_UP, QUESTION, SQL, URL, Person

GREEDY = {"extra_body": {"temperature": 0}}
ASK: Any = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 100, **GREEDY}
TOOLS: Any = [
    {
        "name": "get_city",
        "description": "Tell in which city somebody lives.",
        "input_schema": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    }
]


def client() -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=URL, api_key="none")


def test_the_page(printed_by: Callable[[str], str]) -> None:
    assert printed_by("anthropic") == SQL


def test_a_stream() -> None:
    with client().messages.stream(model="sql", **ASK) as stream:
        assert "".join(stream.text_stream) == SQL
        assert stream.get_final_message().stop_reason == "end_turn"


def test_parsed_output() -> None:
    message = client().messages.parse(model="json", **ASK, output_format=Person)
    assert message.parsed_output == Person(name="Ada", city="London")


def test_a_loop_of_tools() -> None:
    told: list[Any] = [{"role": "user", "content": LOOK_UP}]
    ask: Any = {"model": "tools", "tools": TOOLS, "max_tokens": 100, **GREEDY}
    message = client().messages.create(messages=told, **ask)
    [use] = [block for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason, use.name, use.input) == ("tool_use", "get_city", {"name": "Ada"})
    with client().messages.stream(messages=told, **ask) as stream:
        [again] = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert again.input == use.input
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "London"}
    told += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    [text] = client().messages.create(messages=told, **ask).content
    assert text.type == "text"
    assert text.text == "The city of Ada is London."
