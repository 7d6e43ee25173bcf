"""Answers that are held to a grammar, asked for in every way that clients know."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema_rs
import openai
import pydantic
import pytest

from manylora.loadtest.checks.structured_speed import measure
from tests.server.api.running import BASE, Running

HELLO = [{"role": "user", "content": "hello"}]
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
        prompt = {"messages": HELLO}
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
    class Short(pydantic.BaseModel):
        kind: str = pydantic.Field(pattern="^(here|there)$")
        on: bool

    done = client.chat.completions.parse(
        model=BASE, messages=[{"role": "user", "content": "x"}], response_format=Short, max_tokens=100
    )
    parsed = done.choices[0].message.parsed
    assert parsed is not None
    assert parsed.kind in ("here", "there")


def test_openais_client_is_told_of_an_answer_that_was_cut(client: openai.OpenAI) -> None:
    class Long(pydantic.BaseModel):
        text: str = pydantic.Field(min_length=200)

    with pytest.raises(openai.LengthFinishReasonError) as raised:
        client.chat.completions.parse(
            model=BASE, messages=[{"role": "user", "content": "x"}], response_format=Long, max_tokens=20
        )
    assert raised.value.completion.usage is not None
    assert raised.value.completion.usage.completion_tokens == 20


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format.json_schema.schema",
        '["not"]',
    ),
    (
        {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
        "guided_json",
        "can't end",
    ),
    ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json", "x-guidance"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"structured_outputs": {"json": {"enum": list(range(30_000))}}}, "structured_outputs.json", "too large"),
    ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-around"),
    ({"guided_grammar": "start: foo"}, "guided_grammar", "foo"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_choice": ["a", ""]}, "guided_choice.1", "at least 1"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "response_format.json_schema.name",
        "",
    ),
    (
        {"response_format": {"type": "json_object", "schema": {}}},
        "response_format.schema",
        "json_schema",
    ),
    (
        {"structured_outputs": {"regex": "x", "whitespace_pattern": " *"}},
        "structured_outputs.whitespace_pattern",
        "",
    ),
    ({"guided_whitespace_pattern": " *"}, "guided_whitespace_pattern", "white space"),
]


@pytest.mark.parametrize(("asked", "param", "said"), REFUSED, ids=lambda each: str(each)[:60])
def test_what_makes_no_sense_is_refused_with_its_field(
    http: httpx.Client, asked: dict[str, Any], param: str, said: str
) -> None:
    for path, prompt in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": HELLO})):
        answer = http.post(f"/v1/{path}", json={"model": BASE, **prompt, **asked})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert said in error["message"]


def test_text_asks_for_nothing_beside_a_grammar(http: httpx.Client) -> None:
    body = {
        "model": BASE,
        "prompt": "x",
        "max_tokens": 9,
        "guided_choice": ["left"],
        "response_format": {"type": "text"},
    }
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "left"


def test_adapters_mixtures_and_several_prompts_are_held(http: httpx.Client) -> None:
    for model in ("a", "b", "a:0.5+b:0.5"):
        body = {"model": model, "prompt": ["x", "y"], "n": 2, "max_tokens": 80, "guided_json": SHORT}
        choices = http.post("/v1/completions", json=body).json()["choices"]
        assert [is_short(choice["text"]) for choice in choices] == [True] * 4


def test_logprobs_are_those_of_the_model_s_own_distribution(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": "x", "max_tokens": 1, "temperature": 0, "logprobs": 3}
    free = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    held = http.post("/v1/completions", json={**body, "guided_choice": ["left"]}).json()["choices"][0][
        "logprobs"
    ]
    [best], [own] = free["top_logprobs"], held["top_logprobs"]
    assert {name: own[name] for name in best} == pytest.approx(best)
    assert held["token_logprobs"][0] < 0


def test_streams_of_different_schemas_at_once(server: Running) -> None:
    """32 at a time, each held to its own."""

    def ask(number: int) -> str:
        schema: dict[str, Any] = {"type": "object", "properties": {f"n{number}": {"enum": [number, -number]}}}
        schema = {**schema, "required": [f"n{number}"], "additionalProperties": False}
        body = {"model": BASE, "prompt": "x", "max_tokens": 60, "guided_json": schema}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
        return str(answer["choices"][0]["text"])

    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(ask, range(32)))
    for number, text in enumerate(texts):
        assert json.loads(text)[f"n{number}"] in (number, -number)


def test_the_command_that_measures_asks_with_schemas_and_without(server: Running) -> None:
    figures = asyncio.run(measure(server.url, streams=3, tokens=12, rounds=1, tries=2))
    assert min(figures.plain, figures.held) > 0
