"""What is refused for a field's name, type or value. What passes: test_inert_fields.py."""

import httpx
import pytest

from tests.server.api.running import BASE

CHAT: dict[str, object] = {
    "model": "a",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 2,
    "temperature": 0,
}
COMPLETION: dict[str, object] = {"model": "a", "prompt": "hello", "max_tokens": 2, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}

REFUSED_IN_CHAT: list[tuple[dict[str, object], str]] = [
    ({"temprature": 1}, "temprature"),
    ({"tools": [TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"guided_json": {}, "guided_regex": "x"}, "guided_regex"),
    ({"store": 1}, "store"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"verbosity": "low"}, "verbosity"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"priority": -1}, "priority"),
    ({"priority": False}, "priority"),
    ({"chat_template": "x"}, "chat_template"),
    ({"cache_salt": "x"}, "cache_salt"),
    ({"echo": True}, "echo"),
    ({"return_token_ids": True}, "return_token_ids"),
    ({"include_reasoning": "no"}, "include_reasoning"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"one": 1}}, "logit_bias"),
    ({"logit_bias": {"320": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1, "01": -1}}, "logit_bias"),
    ({"logit_bias": {"\N{ARABIC-INDIC DIGIT ONE}": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop_token_ids": [320]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "2"}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"logprobs": 3}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "mood": "sad"}]}, "messages.0.mood"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.image_url"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]}, "messages.0.refusal"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
]
REFUSED_IN_COMPLETIONS: list[tuple[dict[str, object], str]] = [
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["x", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt.0"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["x"] * 257}, "prompt"),
    ({"messages": []}, "messages"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"response_format": {"type": "json_object"}, "guided_choice": ["x"]}, "guided_choice"),
]


def refusal(http: httpx.Client, path: str, body: dict[str, object]) -> dict[str, object]:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, object] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("change", "field"), REFUSED_IN_CHAT, ids=lambda case: str(case)[:60])
def test_chat_refuses(http: httpx.Client, change: dict[str, object], field: str) -> None:
    error = refusal(http, "/v1/chat/completions", {**CHAT, **change})
    assert error["param"] == field
    assert field.split(".")[0] in str(error["message"])


@pytest.mark.parametrize(("change", "field"), REFUSED_IN_COMPLETIONS, ids=lambda case: str(case)[:60])
def test_completions_refuse(http: httpx.Client, change: dict[str, object], field: str) -> None:
    error = refusal(http, "/v1/completions", {**COMPLETION, **change})
    assert error["param"] == field
    assert field.split(".")[0] in str(error["message"])


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(http: httpx.Client, field: str) -> None:
    body = {key: value for key, value in CHAT.items() if key != field}
    assert refusal(http, "/v1/chat/completions", body)["param"] == field


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_logprobs": 2}, "logprobs: true"),
        ({"continue_final_message": True}, "add_generation_prompt: false"),
    ],
)
def test_fields_that_need_another_say_which(
    http: httpx.Client, change: dict[str, object], words: str
) -> None:
    error = refusal(http, "/v1/chat/completions", {**CHAT, **change})
    assert words in str(error["message"])
    assert error["param"] == next(iter(change))


def test_a_prompt_over_the_context_is_told_with_three_numbers(http: httpx.Client) -> None:
    body = {**COMPLETION, "prompt": [5] * 1000, "max_tokens": 25}
    error = refusal(http, "/v1/completions", body)
    assert error["code"] == "context_length_exceeded"
    assert all(number in str(error["message"]) for number in ("1000", "25", "1024"))
    # By which LiteLLM and LangChain know it, whatever the code.
    assert "this model's maximum context length is" in str(error["message"])
    assert "prompt is too long" in str(error["message"])
    assert http.post("/v1/completions", json={**body, "max_tokens": 24}).status_code == 200


def test_a_prompt_that_fills_the_context_is_refused(http: httpx.Client) -> None:
    for prompt in ([5] * 1024, [5] * 2000, "x" * 2000):
        error = refusal(http, "/v1/completions", {**COMPLETION, "prompt": prompt})
        assert error["code"] == "context_length_exceeded"
    message = {"role": "user", "content": "x" * 2000}
    error = refusal(http, "/v1/chat/completions", {"model": "a", "messages": [message]})
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("model", ["nobody", "A", "../a", "a/", "x" * 10_000])
def test_an_unknown_model_is_404_and_never_the_base(http: httpx.Client, path: str, model: str) -> None:
    body = {**(CHAT if "chat" in path else COMPLETION), "model": model}
    answer = http.post(path, json=body)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert f"{BASE}" in error["message"]
    assert len(error["message"]) < 1000


def test_unknown_routes_and_methods_are_told_in_the_envelope(http: httpx.Client) -> None:
    for answer, status, code in (
        (http.get("/v1/nothing"), 404, "not_found"),
        (http.get("/v1/chat/completions"), 405, "method_not_allowed"),
        (http.delete("/adapters/a?abort=maybe"), 400, None),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/health", "GET, HEAD"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/chat/completions", "POST"),
        ("/adapters", "GET, HEAD, POST"),
        ("/adapters/nobody", "DELETE, GET, HEAD, PATCH, PUT"),
        ("/exports", "GET, HEAD, POST"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_a_method_that_is_not_there_is_told_those_that_are(
    http: httpx.Client, path: str, methods: str
) -> None:
    answer = http.request("TRACE", path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == methods
    for method in methods.split(", "):
        assert http.request(method, path, json={}).status_code != 405


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/a", "/adapters"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    whole, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert http.head("/v1/models/nobody").status_code == 404
