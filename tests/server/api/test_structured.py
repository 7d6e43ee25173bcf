"""Answers that are held to a grammar, asked for in every way that clients know."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

from tests.server.api.running import BASE

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "kind": {"enum": ["here", "there"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}
SHORT = {
    "type": "object",
    "properties": {"kind": {"enum": ["here", "there"]}, "on": {"type": "boolean"}},
    "required": ["kind", "on"],
    "additionalProperties": False,
}


def valid(text: str, schema: dict[str, Any]) -> bool:
    return jsonschema_rs.is_valid(schema, json.loads(text))


def is_short(text: str) -> bool:
    return valid(text, SHORT)


FORMAT = {"type": "json_schema", "json_schema": {"name": "short", "schema": SHORT, "strict": True}}
WAYS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"response_format": FORMAT}, is_short),
    ({"guided_json": SHORT}, is_short),
    ({"guided_json": json.dumps(SHORT)}, is_short),
    ({"structured_outputs": {"json": SHORT}}, is_short),
    ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, lambda text: len(text) == 6 and text[3] == "-"),
    ({"structured_outputs": {"regex": "(yes|no)!"}}, lambda text: text in ("yes!", "no!")),
    ({"guided_choice": ["left", "right", 'é "q"']}, lambda text: text in ("left", "right", 'é "q"')),
    ({"structured_outputs": {"choice": ["a", "ab"]}}, lambda text: text in ("a", "ab")),
    ({"guided_grammar": 'root ::= "x" [0-9] "y"'}, lambda text: text[0] + text[2:] == "xy"),
    ({"structured_outputs": {"grammar": 'start: "<" /[a-z]{2}/ ">"'}}, lambda text: text[0] == "<"),
]


@pytest.mark.parametrize(("asked", "holds"), WAYS)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_answers_are_what_was_asked_for(
    http: httpx.Client, route: str, asked: dict[str, Any], holds: Callable[[str], bool]
) -> None:
    prompt: dict[str, Any] = {"prompt": "hello"}
    if route.startswith("chat"):
        prompt = {"messages": [{"role": "user", "content": "hello"}]}
    body = {"model": BASE, **prompt, **asked, "n": 3, "seed": 5, "max_tokens": 100}
    answer = http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert choice["finish_reason"] == "stop"
        assert holds(text), text


def test_any_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "x"}],
        response_format={"type": "json_object"},
        max_tokens=60,
        logit_bias={},
    )
    [choice] = answer.choices
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": BASE,
        "prompt": "x",
        "seed": 3,
        "max_tokens": 80,
        "extra_body": {"guided_json": SHORT},
    }
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert is_short(whole.choices[0].text)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"


def test_parse_of_the_openai_client(client: openai.OpenAI) -> None:
    import pydantic

    class Short(pydantic.BaseModel):
        kind: str = pydantic.Field(pattern="^(here|there)$")
        on: bool

    done = client.chat.completions.parse(
        model=BASE, messages=[{"role": "user", "content": "x"}], response_format=Short, max_tokens=100
    )
    parsed = done.choices[0].message.parsed
    assert parsed is not None
    assert parsed.kind in ("here", "there")
