"""/v1/messages: Anthropic's shapes, held by hand; test_anthropic_client.py asks with its own client."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.server.api.running import BASE, TEMPLATE, Files, Running, running
from tests.server.api.talkers import talking
from tests.server.api.tool_templates import HERMES, THINKING

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"name": "get_weather", "description": "Forecast.", "input_schema": CITY},
    {"type": "custom", "name": "now", "input_schema": {"type": "object", "maxProperties": 0}},
]
CANT_BE_HELD = {"name": "f", "strict": True, "input_schema": {"type": "object", "not": {}}}
ASK: dict[str, Any] = {
    "model": "hermes",
    "max_tokens": 12,
    "temperature": 0,
    "messages": [{"role": "user", "content": "weather?"}],
}
CALL: dict[str, Any] = {"tools": TOOLS, "tool_choice": {"type": "any"}, "max_tokens": 120}
TOLD = "{% for m in messages %}[{{ m.role }}:{{ m.content }}"
TOLD += "{% if m.reasoning_content %}?{{ m.reasoning_content }}{% endif %}"
TOLD += "{% for c in m.tool_calls %}!{{ c.function.name }}{{ c.function.arguments.city }}{% endfor %}"
TOLD += "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}]{% endfor %}"
TOLD += (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}{# tool-parser: hermes #}"
)
"""A template that writes down all that it is told."""


@pytest.fixture(scope="module")
def talkers(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    templates = {"hermes": HERMES, "thinking": THINKING, "told": TOLD, "plain": TEMPLATE, "other": HERMES}
    with talking(files, tmp_path_factory, templates) as server:
        yield server


@pytest.fixture
def http(talkers: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=talkers.url, timeout=30) as client:
        yield client
    talkers.wait_until_idle()
    talkers.check_integrity()


def ask(http: httpx.Client, **fields: Any) -> Any:
    response = http.post("/v1/messages", json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events_of(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """Return a stream's events, each of which must be named as its data say."""
    response = http.post("/v1/messages", json={**ASK, **fields, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    found = []
    for written in response.text.rstrip("\n").split("\n\n"):
        name, data = written.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def gathered(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put a stream together as clients do, having checked its order."""
    first, *rest, delta, last = events
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message: dict[str, Any] = first["message"]
    assert message["content"] == []
    open_block: int | None = None
    text = ""
    for event in rest:
        if event["type"] == "ping":
            continue
        if event["type"] == "content_block_start":
            assert open_block is None
            open_block, text = event["index"], ""
            assert open_block == len(message["content"])
            message["content"].append(event["content_block"])
            continue
        assert event["index"] == open_block
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            open_block = None
            if block["type"] == "tool_use":
                block["input"] = json.loads(text or "{}")
            continue
        piece = event["delta"]
        kind = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
        assert piece["type"] == kind[block["type"]]
        if block["type"] == "tool_use":
            text += piece["partial_json"]
        else:
            block[block["type"]] += piece[block["type"]]
    assert open_block is None
    return {**message, **delta["delta"], "usage": delta["usage"]}


def alike(message: dict[str, Any]) -> dict[str, Any]:
    """Return what two answers to one request have in common."""
    usage = message["usage"]
    spent = usage["input_tokens"] + usage["cache_read_input_tokens"], usage["output_tokens"]
    blocks = [{**block, "id": ""} if "id" in block else block for block in message["content"]]
    return {**message, "id": "", "content": blocks, "usage": spent}


def test_a_text_is_one_block(http: httpx.Client) -> None:
    message = ask(http)
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "hermes")
    [block] = message["content"]
    assert set(block) == {"type", "text"}
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    usage = message["usage"]
    assert usage["output_tokens"] == 12
    assert usage["cache_creation_input_tokens"] == 0
    counted = http.post("/v1/messages/count_tokens", json={k: ASK[k] for k in ("model", "messages")})
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop_sequences": ["\u0000"]},
        CALL,
        {**CALL, "tool_choice": {"type": "tool", "name": "get_weather"}},
        {"model": "thinking", "thinking": {"type": "enabled"}, "chat_template_kwargs": {"opened": True}},
        {"model": "other:0.5+hermes"},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(http: httpx.Client, fields: dict[str, Any]) -> None:
    whole = ask(http, **fields)
    assert alike(gathered(events_of(http, **fields))) == alike(whole)


def test_a_stop_sequence_is_told(http: httpx.Client) -> None:
    text = ask(http)["content"][0]["text"]
    stop = text[3:5]
    message = ask(http, stop_sequences=[stop, "never said"])
    assert message["content"] == [{"type": "text", "text": text[: text.index(stop)]}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    told = gathered(events_of(http, stop_sequences=[stop]))
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", stop)


def test_an_answer_that_says_nothing_is_an_empty_text(http: httpx.Client) -> None:
    stop = ask(http)["content"][0]["text"][0]
    for message in (ask(http, stop_sequences=[stop]), gathered(events_of(http, stop_sequences=[stop]))):
        assert message["content"] == [{"type": "text", "text": ""}]


def test_tools_are_called_in_blocks_of_their_own(http: httpx.Client) -> None:
    message = ask(http, **{**CALL, "tool_choice": {"type": "tool", "name": "get_weather"}})
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    [block] = message["content"]
    assert (block["type"], block["name"]) == ("tool_use", "get_weather")
    assert jsonschema_rs.is_valid(CITY, block["input"])
    one = ask(http, **{**CALL, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}})
    assert [block["type"] for block in one["content"]] == ["tool_use"]
    assert one["stop_reason"] == "tool_use"
    off = ask(http, **{**CALL, "tool_choice": {"type": "none"}, "max_tokens": 8})
    assert [block["type"] for block in off["content"]] == ["text"]


def test_a_call_that_is_cut_short_is_told_as_far_as_it_came(http: httpx.Client) -> None:
    fields = {**CALL, "tool_choice": {"type": "tool", "name": "get_weather"}}
    spent = ask(http, **fields)["usage"]["output_tokens"]
    for most in range(3, spent, 7):
        message = ask(http, **{**fields, "max_tokens": most})
        assert message["stop_reason"] == "max_tokens"
        for block in message["content"]:
            if block["type"] == "tool_use":
                assert set(block["input"]) <= {"city", "days"}


def test_thoughts_are_told_to_whom_asks_for_them(http: httpx.Client) -> None:
    opened = {"model": "thinking", "chat_template_kwargs": {"opened": True}}
    shown = ask(http, **opened, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block["type"] for block in shown["content"]] == ["thinking"]
    assert shown["content"][0]["thinking"]
    assert shown["content"][0]["signature"] == ""
    for hidden in ({}, {"thinking": {"type": "adaptive", "display": "omitted"}}):
        template = {"chat_template_kwargs": {"opened": True, "enable_thinking": True}}
        assert [b["type"] for b in ask(http, **{**opened, **template}, **hidden)["content"]] == ["text"]


def test_who_does_not_ask_for_thoughts_has_the_template_told_so(http: httpx.Client) -> None:
    def count(**fields: Any) -> int:
        asked = {"model": "thinking", "messages": ASK["messages"], **fields}
        return int(http.post("/v1/messages/count_tokens", json=asked).json()["input_tokens"])

    on, off = count(thinking={"type": "adaptive"}), count(thinking={"type": "disabled"})
    assert off == count() > on
    high = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
    assert count(**high) == on + len("(high)")  # the base has a token for each byte
    assert count(**{**high, "model": "plain"}) > 0  # which knows no levels


def test_answers_are_held_to_a_schema(http: httpx.Client) -> None:
    held = {"type": "json_schema", "schema": CITY}
    for fields in ({"output_config": {"format": held}}, {"output_format": held}):
        [block] = ask(http, **fields, max_tokens=100)["content"]
        assert jsonschema_rs.is_valid(CITY, json.loads(block["text"]))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "[user:a]"),
        ({"system": "s", "messages": [{"role": "user", "content": "a"}]}, "[system:s][user:a]"),
        (
            {
                "system": [
                    {"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "t"},
                ],
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
                    },
                ],
            },
            "[system:s\n\nt][user:a\n\nb\nc]",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "hm", "signature": ""},
                            {"type": "redacted_thinking", "data": "xyz"},
                            {"type": "text", "text": "b"},
                            {
                                "type": "tool_use",
                                "id": "t1",
                                "name": "get_weather",
                                "input": {"city": "Oslo"},
                            },
                            {"type": "tool_use", "id": "t2", "name": "now", "input": {}},
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
                            {
                                "type": "tool_result",
                                "tool_use_id": "t2",
                                "content": [
                                    {"type": "text", "text": "no"},
                                    {"type": "text", "text": "clock"},
                                ],
                                "is_error": True,
                            },
                            {"type": "text", "text": "so?"},
                        ],
                    },
                ],
                "tools": TOOLS,
            },
            "[user:a][assistant:b?hm!get_weatherOslo!now][tool:rain#t1][tool:Error: no\nclock#t2][user:so?]"
            "get_weathernow",
        ),
    ],
)
def test_messages_are_told_to_templates_as_turns(
    http: httpx.Client, fields: dict[str, Any], told: str
) -> None:
    plain = http.post("/tokenize", json={"model": "told", "prompt": told, "add_special_tokens": False})
    counted = http.post("/v1/messages/count_tokens", json={"model": "told", **fields})
    assert counted.json() == {"input_tokens": plain.json()["count"]}
    completion = {
        "model": "told",
        "prompt": told,
        "add_special_tokens": False,
        "max_tokens": 8,
        "temperature": 0,
    }
    said = http.post("/v1/completions", json=completion).json()["choices"][0]["text"]
    [block] = ask(http, **fields, model="told", max_tokens=8)["content"]
    assert block["text"] == said


def test_an_assistants_text_at_the_end_is_gone_on_with(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is"}]
    chat = {"model": "hermes", "messages": messages, "max_tokens": 8, "temperature": 0}
    more = {"add_generation_prompt": False, "continue_final_message": True}
    said = http.post("/v1/chat/completions", json={**chat, **more}).json()["choices"][0]["message"]
    assert ask(http, messages=messages, max_tokens=8)["content"][0]["text"] == said["content"]


CLAUDE_CODE: dict[str, Any] = {
    "system": [{"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}
    ],
    "tools": [
        {**TOOLS[0], "eager_input_streaming": True, "cache_control": {"type": "ephemeral"}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "metadata": {"user_id": "user_0_account__session_1"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "speed": "standard",
    "something_of_next_year": {"x": 1},
}


def test_what_claude_code_sends_is_answered(http: httpx.Client) -> None:
    asked = {**ASK, **CLAUDE_CODE, "stream": True}
    headers = {"x-api-key": "any", "anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    response = http.post("/v1/messages?beta=true", json=asked, headers=headers)
    assert response.status_code == 200, response.text
    assert response.text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_token": 5}, "max_token"),
        ({"stop": ["x"]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking"}]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0.id"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "messages.0.content",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "later"}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": TOOLS, "model": "plain"}, "tools"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search_1", "name": "web_search"}, CANT_BE_HELD]}, "tools.1.input_schema"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "output_config.format.schema",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_its_place(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/messages", json={**ASK, **fields})
    assert response.status_code == 400, response.text
    told = response.json()
    assert told["type"] == "error"
    assert (told["error"]["type"], told["error"]["param"]) == ("invalid_request_error", param)


def test_errors_are_anthropics(
    http: httpx.Client, files: Files, tmp_path_factory: pytest.TempPathFactory
) -> None:
    told = http.post("/v1/messages", json={**ASK, "model": "nobody"})
    assert told.status_code == 404
    assert (told.json()["type"], told.json()["error"]["type"]) == ("error", "not_found_error")
    assert told.json()["error"]["message"]
    assert http.get("/v1/messages").json()["type"] == "error"
    assert "type" not in http.post("/v1/chat/completions", json={}).json()
    with running(files, tmp_path_factory.mktemp("keys"), api_key="k") as server:
        url = f"{server.url}/v1/messages"
        refused = httpx.post(url, json={**ASK, "model": BASE}, headers={"x-api-key": "wrong"})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        assert httpx.post(url, json={**ASK, "model": BASE}, headers={"x-api-key": "k"}).status_code == 200
        asked = {**ASK, "model": BASE, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", url, json=asked, headers={"x-api-key": "k"}, timeout=30) as stream:
            parts = stream.iter_text()
            text = next(parts)
            with server.failing(RuntimeError("secret detail")):
                text += "".join(parts)
        assert "secret" not in text
        name, data = text.rstrip().split("\n\n")[-1].split("\n")
        assert name == "event: error"
        told = json.loads(data.removeprefix("data: "))
        assert (told["type"], told["error"]["type"]) == ("error", "api_error")
