"""Tools as clients use them, with a template of each family; the models are noise that a grammar holds."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel

from tests.server.api.running import Files, Running
from tests.server.api.talkers import talking
from tests.server.api.tool_templates import FAMILIES, THINKING

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Oslo"]},
        "days": {"enum": [1, 2, 3]},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Forecast.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "now"}},
]
ASK: Any = [{"role": "user", "content": "weather?"}]
FAMILY = pytest.mark.parametrize("family", list(FAMILIES))


@pytest.fixture(scope="module")
def callers(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with an adapter for each family of templates."""
    templates = {**FAMILIES, "thinking": THINKING}
    with talking(files, tmp_path_factory, templates) as server:
        yield server


@pytest.fixture
def caller(callers: Running) -> Iterator[openai.OpenAI]:
    with callers.client() as client:
        yield client
    callers.wait_until_idle()
    callers.check_integrity()


def create(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    asked = {"messages": ASK, "tools": TOOLS, "max_tokens": 100, "seed": 3, **fields}
    return client.chat.completions.create(model=model, **asked)


def told_by(client: openai.OpenAI, model: str, n: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """Return what a stream says of each choice, having checked what every delta must be."""
    told: list[dict[str, Any]] = [
        {"content": "", "reasoning": "", "calls": [], "finish": None, "logprobs": []} for _ in range(n)
    ]
    for chunk in create(client, model, stream=True, n=n, **fields):
        for choice in chunk.choices:
            of = told[choice.index]
            assert of["finish"] is None, "nothing follows a finish reason"
            of["content"] += choice.delta.content or ""
            of["reasoning"] += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            for call in choice.delta.tool_calls or ():
                inside = call.function or (call.model_extra or {}).get("custom") or {}
                inside = inside if isinstance(inside, dict) else inside.model_dump()
                text = inside.get("arguments") or inside.get("input") or ""
                if call.index == len(of["calls"]):
                    assert call.id, "a call begins with its id and its name"
                    of["calls"].append((inside["name"], text))
                else:
                    assert call.index == len(of["calls"]) - 1, "calls come one after the other"
                    assert (call.id, call.type, inside.get("name")) == (None, None, None)
                    name, before = of["calls"][-1]
                    of["calls"][-1] = (name, before + text)
            of["finish"] = choice.finish_reason
            of["logprobs"] += (choice.logprobs and choice.logprobs.content) or []
    return told


def calls_of(message: Any) -> list[tuple[str, str]]:
    return [
        (call.function.name, call.function.arguments)
        if call.type == "function"
        else (call.custom.name, call.custom.input)
        for call in message.tool_calls or ()
    ]


@FAMILY
def test_a_required_call_is_made_in_the_models_own_format(caller: openai.OpenAI, family: str) -> None:
    answer = create(caller, family, tool_choice="required", n=2)
    for choice in answer.choices:
        if choice.finish_reason == "length":
            continue  # noise may call for ever
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls
        for name, arguments in calls_of(choice.message):
            schema = {"get_weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}[name]
            assert jsonschema_rs.is_valid(schema, json.loads(arguments))
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)
    if family.startswith("mistral"):
        assert all(len(each) == 9 and each.isalnum() for each in ids)


@FAMILY
def test_a_stream_says_what_the_whole_answer_says(caller: openai.OpenAI, family: str) -> None:
    fields: dict[str, Any] = {
        "tool_choice": "required",
        "n": 3,
        "logprobs": True,
        "parallel_tool_calls": True,
    }
    whole = create(caller, family, **fields)
    told = told_by(caller, family, **fields)
    for choice, of in zip(whole.choices, told, strict=True):
        assert of["calls"] == calls_of(choice.message)
        assert of["content"] == (choice.message.content or "")
        assert of["finish"] == choice.finish_reason
        assert [each.token for each in of["logprobs"]] == [each.token for each in choice.logprobs.content]


@FAMILY
def test_a_named_tool_is_called_once_and_the_answer_stops(caller: openai.OpenAI, family: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(2):
        [choice] = create(caller, family, tool_choice=named, seed=seed, max_tokens=300).choices
        [(name, arguments)] = calls_of(choice.message)
        assert name == "get_weather"
        assert jsonschema_rs.is_valid(WEATHER, json.loads(arguments))
        assert choice.finish_reason == "stop"


@FAMILY
def test_no_more_than_one_call_where_they_may_not_be_parallel(caller: openai.OpenAI, family: str) -> None:
    answer = create(caller, family, tool_choice="required", parallel_tool_calls=False, n=2, max_tokens=300)
    assert [len(choice.message.tool_calls) for choice in answer.choices] == [1] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}


@FAMILY
def test_those_alone_are_called_that_are_allowed(caller: openai.OpenAI, family: str) -> None:
    allowed = [{"type": "function", "function": {"name": "now"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": allowed}}
    answer = create(caller, family, tool_choice=choice, parallel_tool_calls=False, n=2)
    for each in answer.choices:
        [(name, arguments)] = calls_of(each.message)
        assert (name, json.loads(arguments)) == ("now", {})
        assert each.finish_reason == "tool_calls"


@FAMILY
def test_an_answer_may_be_text_where_nothing_must_be_called(caller: openai.OpenAI, family: str) -> None:
    ways: list[dict[str, Any]] = [{}, {"tool_choice": "none"}, {"tool_choice": "auto", "max_tokens": 9}]
    for fields in ways:
        [choice] = create(caller, family, **{"max_tokens": 20, **fields}).choices
        assert choice.message.tool_calls is None
        assert choice.message.content
        assert (
            told_by(caller, family, 1, **{"max_tokens": 20, **fields})[0]["content"] == choice.message.content
        )


@FAMILY
def test_custom_tools_take_text_by_their_grammar(caller: openai.OpenAI, family: str) -> None:
    digits = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[0-9]{3}/[a-c]"}}
    query = {
        "type": "grammar",
        "grammar": {"syntax": "lark", "definition": 'start: "SELECT \\"" NAME "\\";\\n"\nNAME: /[a-z]{2}/'},
    }
    for form, shape in ((digits, r"[0-9]{3}/[a-c]"), (query, r'SELECT "[a-z]{2}";\n')):
        tools = [{"type": "custom", "custom": {"name": "run", "format": form}}]
        asked: dict[str, Any] = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        [choice] = create(caller, family, **asked).choices
        [(name, text)] = calls_of(choice.message)
        assert name == "run"
        assert jsonschema_rs.is_valid({"pattern": f"^{shape}$"}, text), text
        assert told_by(caller, family, **asked)[0]["calls"] == [("run", text)]


def rendered(server: Running, model: str, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = {"model": model, "messages": messages, **fields}
    ids = httpx.post(f"{server.url}/tokenize", json=body).raise_for_status().json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json={"model": model, "tokens": ids}).json()["prompt"]
    assert isinstance(text, str)
    return text


CALL = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}
TURNS: list[dict[str, Any]] = [
    *ASK,
    {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
]


@FAMILY
def test_turns_of_tools_are_told_in_the_models_own_way(callers: Running, family: str) -> None:
    text = rendered(callers, family, TURNS, tools=TOOLS)
    assert "Forecast." in text
    assert "sunny" in text
    written = "<parameter=city>\nParis\n</parameter>" if family == "qwen3-coder" else '"city": "Paris"'
    assert written in text, "arguments are told as what they are, not as a text of JSON"
    with callers.client() as client:
        assert create(client, family, messages=TURNS, max_tokens=2).choices[0].finish_reason == "length"


@FAMILY
def test_who_may_call_nothing_is_told_of_tools_all_the_same(callers: Running, family: str) -> None:
    """And a function without parameters takes none."""
    told = rendered(callers, family, ASK, tools=TOOLS)
    assert '"now"' in told
    with callers.client() as client:
        counts = {
            create(client, family, tool_choice=choice, max_tokens=1).usage.prompt_tokens
            for choice in ("none", "auto", "required")
        }
    assert len(counts) == 1
    named = {"type": "function", "function": {"name": "now"}}
    with callers.client() as client:
        [choice] = create(client, family, tool_choice=named, max_tokens=300).choices
    assert [json.loads(arguments) for _, arguments in calls_of(choice.message)] == [{}]


def test_a_list_of_no_calls_is_none_at_all(callers: Running) -> None:
    turns = [*ASK, {"role": "assistant", "content": "no", "tool_calls": []}, *ASK]
    assert "assistant: no" in rendered(callers, "llama", turns)


class Weather(BaseModel):
    """Forecast."""

    city: Literal["Paris", "Oslo"]
    days: Literal[1, 2, 3]


def test_openais_client_parses_and_streams(caller: openai.OpenAI) -> None:
    tools: Any = [openai.pydantic_function_tool(Weather, name="get_weather")]
    messages: Any = ASK
    parsed = caller.chat.completions.parse(
        model="hermes",
        messages=messages,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    [call] = parsed.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    turns = [*ASK, parsed.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert create(caller, "hermes", messages=turns, max_tokens=2).choices
    with caller.chat.completions.stream(
        model="hermes",
        messages=messages,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    ) as stream:
        kinds = {event.type for event in stream}
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds


def test_a_call_that_is_cut_short_ends_by_its_length(caller: openai.OpenAI) -> None:
    [choice] = create(caller, "hermes", tool_choice="required", max_tokens=28).choices
    assert choice.finish_reason == "length"
    assert told_by(caller, "hermes", tool_choice="required", max_tokens=28)[0]["finish"] == "length"


def test_answers_are_calls_or_what_the_response_format_says(caller: openai.OpenAI) -> None:
    point = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": point, "strict": True}}
    answer = create(caller, "hermes", response_format=form, n=8, parallel_tool_calls=False)
    for choice in answer.choices:
        assert bool(choice.message.tool_calls) != bool(choice.message.content)
        if choice.message.content:
            assert jsonschema_rs.is_valid(point, json.loads(choice.message.content))


LARGE = {"type": "object", "properties": {"id": {"enum": [1234567890123456789]}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
            ]
        },
        "tools.0.function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": LARGE}}]},
        "tools.0.function.parameters",
    ),
    (
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
                },
            ]
        },
        "messages.1.tool_calls.0.function.arguments",
    ),
    (
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}],
                },
            ]
        },
        "messages.1.tool_calls.0.function.arguments",
    ),
    ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id"),
    ({"messages": [*ASK, {"role": "assistant"}]}, "messages.1.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_is_wrong_is_refused_by_its_place(callers: Running, fields: dict[str, Any], param: str) -> None:
    body = {"model": "hermes", "messages": ASK, "tools": TOOLS, "max_tokens": 2, **fields}
    answer = httpx.post(f"{callers.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_schema_that_cant_be_held_is_no_reason_to_refuse_what_needn_t_be(caller: openai.OpenAI) -> None:
    loose = {"type": "object", "properties": {"x": {"not": {"type": "string"}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": loose}}]
    [choice] = create(caller, "hermes", tools=tools, tool_choice="required", max_tokens=60).choices
    assert calls_of(choice.message)[0][0] == "f"


@pytest.mark.parametrize(
    ("fields", "param"), [({"tools": TOOLS}, "tools"), ({"messages": TURNS}, "messages.1.tool_calls")]
)
def test_a_template_without_a_place_for_tools_takes_none(
    callers: Running, fields: dict[str, Any], param: str
) -> None:
    """It would leave them out without a word."""
    body = {"model": "thinking", "messages": ASK, **fields}
    answer = httpx.post(f"{callers.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert "no place for" in answer.json()["error"]["message"]


def thought(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        model="thinking",
        messages=ASK,
        max_tokens=12,
        temperature=0,
        **fields,
    )


def test_what_is_thought_is_told_apart_and_counted(caller: openai.OpenAI) -> None:
    opened = {"chat_template_kwargs": {"opened": True}}
    answer = thought(caller, extra_body=opened)
    message = answer.choices[0].message
    assert (message.content, message.tool_calls) == ("", None)
    assert message.model_extra["reasoning_content"]
    assert answer.usage.completion_tokens_details.reasoning_tokens == 12
    hidden = thought(caller, extra_body={**opened, "include_reasoning": False}).choices[0].message
    assert hidden.model_extra == {}
    text = "".join(
        (chunk.choices[0].delta.model_extra or {}).get("reasoning_content") or ""
        for chunk in thought(caller, stream=True, extra_body=opened)
    )
    assert text == message.model_extra["reasoning_content"]


def test_an_answer_that_thinks_first_of_its_own_accord(caller: openai.OpenAI) -> None:
    held = {"guided_regex": "<think>\nab\n</think>\n\ncd", "chat_template_kwargs": {"enable_thinking": False}}
    answer = caller.chat.completions.create(
        model="thinking",
        messages=ASK,
        max_tokens=60,
        extra_body=held,
    )
    message = answer.choices[0].message
    assert message.content == "cd"
    assert (message.model_extra or {})["reasoning_content"] == "ab"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert 0 < (answer.usage.completion_tokens_details.reasoning_tokens or 0) < answer.usage.completion_tokens


def test_thoughts_are_not_held_by_what_the_answer_is_held_to(caller: openai.OpenAI) -> None:
    """Noise doesn't come to the end of its thoughts: were it held at once, it would say yes."""
    answer = thought(caller, extra_body={"guided_choice": ["yes"], "chat_template_kwargs": {"opened": True}})
    assert answer.choices[0].message.content == ""
    off = {"guided_choice": ["yes"], "chat_template_kwargs": {"enable_thinking": False}}
    assert thought(caller, extra_body=off).choices[0].message.content == "yes"


def test_effort_is_for_templates_that_know_of_it(callers: Running, caller: openai.OpenAI) -> None:
    low = thought(caller, reasoning_effort="low").usage
    assert low.prompt_tokens > thought(caller).usage.prompt_tokens
    off = thought(caller, reasoning_effort="none", extra_body={"guided_choice": ["yes"]})
    assert off.choices[0].message.content == "yes"
    body = {"model": "hermes", "messages": ASK, "reasoning_effort": "low"}
    refused = httpx.post(f"{callers.url}/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")
