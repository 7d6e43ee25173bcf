"""/v1/responses, by OpenAI's client and by hand."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel

from manylora.server.api import logprobs
from manylora.server.tokenizer import Vocabulary
from tests.server.api.running import Files, Running
from tests.server.api.talkers import talking
from tests.server.api.test_messages import CITY, TOLD
from tests.server.api.tool_templates import HERMES, THINKING

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Forecast.",
        "parameters": CITY,
        "strict": True,
    },
    {
        "type": "custom",
        "name": "say",
        "format": {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"},
    },
]
CANT_BE_HELD = {"type": "function", "name": "f", "strict": True, "parameters": {"not": {}}}
BAD_GRAMMAR = {
    "type": "custom",
    "name": "g",
    "format": {"type": "grammar", "syntax": "regex", "definition": "(?=x)y"},
}
ASK: dict[str, Any] = {"model": "hermes", "input": "weather?", "max_output_tokens": 12, "temperature": 0}
NAMED: dict[str, Any] = {
    "tools": TOOLS,
    "tool_choice": {"type": "function", "name": "get_weather"},
    "max_output_tokens": 120,
}
CUSTOM: dict[str, Any] = {**NAMED, "tool_choice": {"type": "custom", "name": "say"}}
OPENED: dict[str, Any] = {"model": "thinking", "chat_template_kwargs": {"opened": True}}


@pytest.fixture(scope="module")
def talkers(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    templates = {"hermes": HERMES, "thinking": THINKING, "told": TOLD, "other": HERMES}
    with talking(files, tmp_path_factory, templates) as server:
        yield server


@pytest.fixture
def http(talkers: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=talkers.url, timeout=30) as client:
        yield client
    talkers.wait_until_idle()
    talkers.check_integrity()


@pytest.fixture
def client(talkers: Running) -> Iterator[openai.OpenAI]:
    with talkers.client() as client:
        yield client


def ask(http: httpx.Client, **fields: Any) -> Any:
    response = http.post("/v1/responses", json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events_of(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """Return a stream's events, named as their data say and numbered without gaps."""
    text = http.post("/v1/responses", json={**ASK, **fields, "stream": True}).text
    found = []
    for written in text.rstrip("\n").split("\n\n"):
        name, data = written.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """Return what two responses to one request have in common."""
    new = dict.fromkeys(("id", "call_id"), "")
    items = [{**item, **{k: v for k, v in new.items() if k in item}} for item in response["output"]]
    usage = {**response["usage"], "input_tokens_details": None}
    return {**response, "id": "", "created_at": 0, "output": items, "usage": usage}


def kinds_of(events: Sequence[dict[str, Any]]) -> list[str]:
    """Return the events' types, repeated deltas once."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for place, kind in enumerate(kinds) if not place or kind != kinds[place - 1]]


def test_a_text_is_a_message(http: httpx.Client) -> None:
    told = ask(
        http, instructions="be short", metadata={"a": "b"}, tools=TOOLS, tool_choice="none", store=True
    )
    assert (told["object"], told["status"]) == ("response", "incomplete")
    assert told["incomplete_details"] == {"reason": "max_output_tokens"}
    [item] = told["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"][0]["type"] == "output_text"
    assert told["usage"]["output_tokens"] == 12
    assert (told["store"], told["previous_response_id"]) == (False, None)
    assert (told["instructions"], told["metadata"], told["tool_choice"]) == ("be short", {"a": "b"}, "none")
    assert [tool["name"] for tool in told["tools"]] == ["get_weather", "say"]


TEXT_EVENTS = [
    *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
    *("output_text.done", "content_part.done", "output_item.done"),
]


def test_every_event_comes_in_its_order(http: httpx.Client) -> None:
    assert kinds_of(events_of(http)) == [*TEXT_EVENTS, "incomplete"]
    called = ["function_call_arguments.delta", "function_call_arguments.done"]
    expected = [*TEXT_EVENTS[:3], *called, "output_item.done", "completed"]
    assert kinds_of(events_of(http, **NAMED)) == expected
    custom = [kind.replace("function_call_arguments", "custom_tool_call_input") for kind in expected]
    assert kinds_of(events_of(http, **CUSTOM)) == custom
    thought = [kind.replace("output_text", "reasoning_text") for kind in TEXT_EVENTS]
    assert kinds_of(events_of(http, **OPENED))[: len(thought)] == thought


@pytest.mark.parametrize("fields", [{}, NAMED, CUSTOM, OPENED, {"model": "other:0.5+hermes"}])
def test_a_stream_says_what_the_whole_response_says(http: httpx.Client, fields: dict[str, Any]) -> None:
    whole, events = ask(http, **fields), events_of(http, **fields)
    final = events[-1]["response"]
    assert without_ids(final) == without_ids(whole)
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == final["output"]
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == final["output"][event["output_index"]]["id"]
    for place, item in enumerate(final["output"]):
        text = "".join(e["delta"] for e in events if "delta" in e and e["output_index"] == place)
        assert text == item.get("arguments", item.get("input", (item.get("content") or [{}])[0].get("text")))


LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.mark.parametrize("fields", [LOGPROBS, {**OPENED, **LOGPROBS}, {**NAMED, **LOGPROBS}])
def test_logprobs_are_told_of_a_messages_tokens_streamed_or_not(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    whole, events = ask(http, **fields), events_of(http, **fields)
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    for place, item in enumerate(whole["output"]):
        if item["type"] != "message":
            assert '"logprob"' not in json.dumps(item)
            continue
        [content] = item["content"]
        tokens = content["logprobs"]
        assert len(tokens) == 12
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)
        here = [event for event in events if event.get("output_index") == place and "logprobs" in event]
        deltas = [event for event in here if event["type"] == "response.output_text.delta"]
        assert [token for event in deltas for token in event["logprobs"]] == tokens
        assert here[-1]["type"] == "response.output_text.done"
        assert here[-1]["logprobs"] == tokens


def test_a_stream_s_logprobs_are_made_into_text_once(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end they are told four times: nobody waits until tokens by the thousand are made again."""
    made, make = list[object](), logprobs._token

    def noted(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, object]:
        made.append(token_id)
        return make(vocabulary, token_id, logprob)

    monkeypatch.setattr(logprobs, "_token", noted)
    events = events_of(http, **LOGPROBS)
    told = [json.dumps(event).count('"bytes"') for event in events[-4:]]
    assert told == [12 * 3] * 4
    assert len(made) == 12 * 3


def test_responses_tell_the_logprobs_that_chats_tell(http: httpx.Client, client: openai.OpenAI) -> None:
    [content] = ask(http, include=LOGPROBS["include"])["output"][0]["content"]
    chat = {"model": "hermes", "messages": [{"role": "user", "content": "weather?"}], "temperature": 0}
    told = http.post("/v1/chat/completions", json={**chat, "max_tokens": 12, "logprobs": True}).json()
    assert content["logprobs"] == told["choices"][0]["logprobs"]["content"]
    assert not ask(http)["output"][0]["content"][0]["logprobs"]
    read = client.responses.create(model="hermes", input="x", max_output_tokens=3, top_logprobs=1)
    [item] = read.output
    assert item.type == "message"
    assert item.content[0].type == "output_text"
    assert [len(token.top_logprobs) for token in item.content[0].logprobs or []] == [1, 1, 1]


def test_functions_and_custom_tools_are_called(http: httpx.Client) -> None:
    [call] = ask(http, **NAMED)["output"]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed")
    assert call["call_id"]
    assert jsonschema_rs.is_valid(CITY, json.loads(call["arguments"]))
    [call] = ask(http, **CUSTOM)["output"]
    assert (call["type"], call["name"]) == ("custom_tool_call", "say")
    assert len(call["input"]) == 3
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "say"}]}
    fields = {**NAMED, "tool_choice": allowed, "parallel_tool_calls": False}
    assert [item["type"] for item in ask(http, **fields)["output"]] == ["custom_tool_call"]


def test_openais_client_reads_streams_and_parses(client: openai.OpenAI, http: httpx.Client) -> None:
    class City(BaseModel):
        days: bool

    greedy: Any = {"model": "hermes", "input": "x", "temperature": 0}
    whole = client.responses.create(**greedy, max_output_tokens=12)
    text = ""
    with client.responses.stream(**greedy, max_output_tokens=12) as stream:
        for event in stream:
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == whole.output_text != ""
    parsed = client.responses.parse(**greedy, max_output_tokens=200, text_format=City)
    assert isinstance(parsed.output_parsed, City)
    asked: Any = {"tools": [TOOLS[0]], "tool_choice": NAMED["tool_choice"], "max_output_tokens": 120}
    with client.responses.stream(**greedy, **asked) as stream:
        final = stream.get_final_response()
    [call] = final.output
    assert call.type == "function_call"
    assert call.parsed_arguments == json.loads(call.arguments)


def test_thoughts_are_items_of_their_own(http: httpx.Client) -> None:
    told = ask(http, **OPENED)
    assert [item["type"] for item in told["output"]] == ["reasoning"]
    assert told["output"][0]["content"][0]["text"]
    assert (told["status"], told["output"][0]["status"]) == ("incomplete", "incomplete")
    assert told["usage"]["output_tokens_details"]["reasoning_tokens"] == 12


def test_answers_are_held_to_a_format_beside_tools_and_thoughts(http: httpx.Client) -> None:
    point = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
    schema = {**point, "additionalProperties": False}
    held = {"text": {"format": {"type": "json_schema", "name": "p", "schema": schema, "strict": True}}}
    [item] = ask(http, **held, model="thinking", reasoning={"effort": "none"}, max_output_tokens=60)["output"]
    assert jsonschema_rs.is_valid(schema, json.loads(item["content"][0]["text"]))
    for seed_of_a_prompt in "abc":
        told = ask(http, **held, input=seed_of_a_prompt, tools=TOOLS[:1], max_output_tokens=200)["output"]
        texts = [item for item in told if item["type"] == "message"]
        assert all(jsonschema_rs.is_valid(schema, json.loads(t["content"][0]["text"])) for t in texts)
        assert texts or told[0]["type"] == "function_call"
    # What is thought is held by nothing, and told apart.
    assert [item["type"] for item in ask(http, **held, **OPENED)["output"]] == ["reasoning"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"input": "a"}, "[user:a]"),
        (
            {
                "instructions": "s",
                "input": [
                    {
                        "type": "message",
                        "role": "developer",
                        "content": [{"type": "input_text", "text": "d"}],
                    },
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": "b"},
                ],
            },
            "[system:s\n\nd][user:a][user:b]",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "a"},
                    {
                        "type": "reasoning",
                        "id": "rs_1",
                        "summary": [],
                        "content": [{"type": "reasoning_text", "text": "hm"}],
                        "encrypted_content": None,
                    },
                    {
                        "type": "message",
                        "id": "msg_1",
                        "role": "assistant",
                        "status": "completed",
                        "content": [{"type": "output_text", "text": "b", "annotations": []}],
                    },
                    {
                        "type": "function_call",
                        "call_id": "c1",
                        "name": "get_weather",
                        "arguments": '{"city": "Oslo"}',
                    },
                    {"type": "custom_tool_call", "call_id": "c2", "name": "say", "input": "aba"},
                    {"type": "function_call_output", "call_id": "c1", "output": "rain"},
                    {
                        "type": "custom_tool_call_output",
                        "call_id": "c2",
                        "output": [{"type": "input_text", "text": "said"}],
                    },
                ],
                "tools": TOOLS,
                "tool_choice": "none",  # nothing holds the answer
            },
            "[user:a][assistant:b?hm!get_weatherOslo!say][tool:rain#c1][tool:said#c2]get_weathersay",
        ),
    ],
)
def test_items_are_told_to_templates_as_turns(http: httpx.Client, fields: dict[str, Any], told: str) -> None:
    completion = {
        "model": "told",
        "prompt": told,
        "add_special_tokens": False,
        "max_tokens": 8,
        "temperature": 0,
    }
    plain = http.post("/v1/completions", json=completion).json()
    response = ask(http, **fields, model="told", max_output_tokens=8)
    assert response["usage"]["input_tokens"] == plain["usage"]["prompt_tokens"]
    assert response["output"][0]["content"][0]["text"] == plain["choices"][0]["text"]


CODEX: dict[str, Any] = {
    "instructions": "You are Codex.",
    "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
    "tools": [
        {**TOOLS[0], "output_schema": None, "defer_loading": False},
        {"type": "web_search", "external_web_access": False},
        {"type": "namespace", "name": "mcp__x", "description": "d", "tools": [{"type": "function"}]},
        {"type": "image_generation", "output_format": "png"},
        {"type": "local_shell"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "x",
    "service_tier": "priority",
    "text": {"verbosity": "low"},
    "client_metadata": {"x": "y"},
    "something_of_next_year": {"x": 1},
}


def test_what_codex_sends_is_answered(http: httpx.Client) -> None:
    events = events_of(http, **CODEX)
    assert events[-1]["type"] in ("response.incomplete", "response.completed")
    assert [tool["name"] for tool in events[-1]["response"]["tools"]] == ["get_weather"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"instruction": "x"}, "instruction"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input.0.call_id"),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "x", "arguments": "["}]},
            "input.0.arguments",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "web_search"}, CANT_BE_HELD]}, "tools.1.parameters"),
        ({"tools": [*TOOLS, BAD_GRAMMAR]}, f"tools.{len(TOOLS)}.format"),
    ],
)
def test_what_is_wrong_is_refused_by_its_place(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/responses", json={**ASK, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_an_answer_that_fails_says_so_in_its_last_event(talkers: Running) -> None:
    asked = {**ASK, "max_output_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{talkers.url}/v1/responses", json=asked, timeout=30) as stream:
        parts = stream.iter_text()
        text = next(parts)
        with talkers.failing(RuntimeError("secret detail")):
            text += "".join(parts)
    assert "secret" not in text
    last = json.loads(text.rstrip().split("data: ")[-1])
    assert last["type"] == "response.failed"
    assert (last["response"]["status"], last["response"]["error"]["code"]) == ("failed", "step_failed")
