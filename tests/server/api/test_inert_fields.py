"""Fields that ask for nothing pass on every route, and what isn't served is told by what it is."""

import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai.types.chat as openai_chat
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAIChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAICompletion

from manylora.server.api.inert import BODY, MERGED, PART, PART_OF_MIXTURE
from manylora.server.api.inert import MESSAGE as MESSAGE_FIELDS
from tests.server.api.running import Files

MESSAGE: dict[str, object] = {"role": "user", "content": "hello"}
CHAT: dict[str, object] = {"model": "a", "messages": [MESSAGE], "max_tokens": 2, "temperature": 0}
COMPLETION: dict[str, object] = {"model": "a", "prompt": "hello", "max_tokens": 2, "temperature": 0}

# As real clients send them: OpenAI's own, LangChain, LlamaIndex, LiteLLM, and vLLM's with all defaults written out.
PASSES: list[dict[str, object]] = [
    {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"},
    {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "explicit"}, "session_id": "s"},
    {"store": True},
    {"store": False, "service_tier": "auto", "parallel_tool_calls": True},
    {"service_tier": "default", "parallel_tool_calls": False},
    {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none"},
    {"tool_choice": "auto", "function_call": "auto"},
    {"response_format": {"type": "text"}, "modalities": ["text"], "suffix": ""},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    {"stream": False, "stream_options": None},
    {"best_of": 1},
    {
        "add_special_tokens": False,
        "bad_words": [],
        "continue_final_message": False,
        "documents": [],
        "echo": False,
        "include_reasoning": True,
        "include_stop_str_in_output": False,
        "length_penalty": 1.0,
        "priority": 0,
        "return_token_ids": False,
        "return_tokens_as_token_ids": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "use_beam_search": False,
        "vllm_xargs": {},
    },
    {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 1, "top_p": 1, "stop": []},
    {"top_k": -1, "stop_token_ids": [], "ignore_eos": False, "min_tokens": 0, "repetition_penalty": 1},
    dict.fromkeys(
        (
            "tools",
            "tool_choice",
            "stop",
            "seed",
            "n",
            "top_p",
            "stream_options",
            "audio",
            "stream",
            "anything",
        )
    ),
]
PASSES_IN_MESSAGES: list[dict[str, object]] = [
    {"tool_calls": [], "annotations": [], "cache_control": {"type": "ephemeral"}, "refusal": None},
    {"tool_calls": None, "function_call": None, "audio": None, "refusal": "", "name": None},
    {"annotations": [{"type": "url_citation"}], "provider_specific_fields": {"refusal": None}, "id": "msg_1"},
    {"images": [], "thinking_blocks": [], "reasoning_content": None, "reasoning": ""},
    {"parsed": {"name": "Ada"}},
    {"content": [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]},
    {"content": [{"type": "text", "text": "hello", "annotations": [], "prompt_cache_breakpoint": {}}]},
]
NOT_SERVED: list[tuple[dict[str, object], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "no place for tools"),
    ({"tool_choice": "required"}, "goes with tools"),
    ({"functions": [{"name": "f"}]}, "the old name of tools"),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "the old name of tool"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "x"}}]}, "the old name of tool_calls"),
    ({"guided_decoding_backend": "outlines"}, "llguidance"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "%json"),
    ({"audio": {"voice": "x"}}, "only text is served"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "only text"),
    ({"reasoning_effort": "high"}, '"none" may be sent'),
    ({"service_tier": "flex"}, '"auto" and "default" may be sent'),
    ({"temprature": 1}, "did you mean 'temperature'?"),
    ({"request_id": "x"}, "x-request-id"),
]


def choices(http: httpx.Client, path: str, body: dict[str, object]) -> object:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize("extra", PASSES, ids=lambda each: str(each)[:60])
def test_what_asks_for_nothing_passes_in_both_kinds_of_completions(
    http: httpx.Client, extra: dict[str, object]
) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        assert choices(http, path, {**body, **extra}) == choices(http, path, body)


def test_no_top_logprobs_of_no_logprobs_pass_in_chats(http: httpx.Client) -> None:
    for extra in ({"logprobs": False, "top_logprobs": 0}, {"top_logprobs": None}, {"top_logprobs": 0}):
        answer = choices(http, "/v1/chat/completions", {**CHAT, **extra})
        assert answer == choices(http, "/v1/chat/completions", CHAT)


def test_the_default_of_best_of_passes_beside_any_n(http: httpx.Client) -> None:
    for best_of in (1, 2):
        body = {**COMPLETION, "n": 2, "best_of": best_of}
        assert choices(http, "/v1/completions", body) == choices(
            http, "/v1/completions", {**COMPLETION, "n": 2}
        )


@pytest.mark.parametrize("extra", PASSES_IN_MESSAGES, ids=lambda each: str(each)[:60])
def test_what_asks_for_nothing_passes_in_messages(http: httpx.Client, extra: dict[str, object]) -> None:
    body = {**CHAT, "messages": [{**MESSAGE, **extra}]}
    assert choices(http, "/v1/chat/completions", body) == choices(http, "/v1/chat/completions", CHAT)


OTHER_ROUTES: list[tuple[str, str, dict[str, object]]] = [
    ("POST", "/tokenize", {"prompt": "x"}),
    ("POST", "/detokenize", {"tokens": [5]}),
    ("POST", "/adapters", {"name": "a", "src": "a"}),
    ("PUT", "/adapters/a", {"src": "a"}),
]


@pytest.mark.parametrize(("method", "path", "body"), OTHER_ROUTES, ids=lambda each: str(each)[:20])
def test_what_asks_for_nothing_passes_on_every_route(
    http: httpx.Client, method: str, path: str, body: dict[str, object]
) -> None:
    for extra in (
        {"metadata": {}, "user": "me"},
        {"store": True},
        {"skip_special_tokens": True},
        {"x": None},
    ):
        answer = http.request(method, path, json={**body, **extra})
        assert answer.status_code == 200, answer.text
    refused = http.request(method, path, json={**body, "x": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x")


@pytest.mark.parametrize(("extra", "words"), NOT_SERVED, ids=lambda each: str(each)[:60])
def test_what_is_not_served_is_told_by_what_it_is(
    http: httpx.Client, extra: dict[str, object], words: str
) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, **extra})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["{name}", "{", "}{0}", "x" * 5000])
def test_an_unknown_name_is_repeated_as_it_is_and_not_at_length(http: httpx.Client, name: str) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, name: 1})
    assert answer.json()["error"]["param"] == name[:100]
    assert len(answer.text) < 500


def typed_dicts() -> Iterator[tuple[str, object, dict[str, object]]]:
    """Yield (where, a type of openai's client, the body around a field of it)."""
    yield "/v1/chat/completions", OpenAIChat, {}
    yield "/v1/completions", OpenAICompletion, {}
    for role in ("User", "System", "Developer", "Assistant", "Tool", "Function"):
        yield "message", getattr(openai_chat, f"ChatCompletion{role}MessageParam"), {"role": role.lower()}
    for part in ("Text", "Image", "InputAudio", "Refusal"):
        yield "part", getattr(openai_chat, f"ChatCompletionContentPart{part}Param"), {}


@pytest.mark.parametrize(
    ("where", "kind", "around"), [*typed_dicts()], ids=lambda each: getattr(each, "__name__", "")
)
def test_no_field_of_openais_client_is_called_unknown(
    http: httpx.Client, where: str, kind: type, around: dict[str, object]
) -> None:
    for name in typing.get_type_hints(kind):
        # No field takes this, so what is refused is refused by name.
        odd = {name: [[0.5]]}
        if where == "message":
            path, body = "/v1/chat/completions", {**CHAT, "messages": [{**MESSAGE, **around, **odd}]}
        elif where == "part":
            part = {"type": "text", "text": "x", **odd}
            path, body = "/v1/chat/completions", {**CHAT, "messages": [{**MESSAGE, "content": [part]}]}
        else:
            path, body = where, {**(CHAT if "chat" in where else COMPLETION), **odd}
        answer = http.post(path, json=body)
        assert answer.status_code in (200, 400), answer.text
        assert "server knows" not in answer.text, answer.text


def test_an_assistants_reasoning_reaches_the_template(files: Files, http: httpx.Client) -> None:
    """By the name that templates know, under whichever of two it comes."""
    directory = files.adapters / "thinking"
    shutil.copytree(files.adapters / "templated", directory)
    template = "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    http.post("/adapters", json={"name": "thinking", "src": "thinking"}).raise_for_status()
    try:
        for field in ("reasoning_content", "reasoning"):
            turn = {"role": "assistant", "content": "said", field: "thought"}
            ids = http.post("/tokenize", json={"model": "thinking", "messages": [turn]}).json()["tokens"]
            assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "saidthought"
    finally:
        http.delete("/adapters/thinking").raise_for_status()
        shutil.rmtree(directory)


def test_tokenize_goes_on_with_the_last_message_as_chats_do(http: httpx.Client) -> None:
    turns = [MESSAGE, {"role": "assistant", "content": "so"}]
    going_on = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True}
    ended = {"messages": turns, "add_generation_prompt": False}
    counts = [http.post("/tokenize", json=body).json()["count"] for body in (going_on, ended)]
    usage = http.post("/v1/chat/completions", json={**CHAT, **going_on}).json()["usage"]
    assert counts[0] == usage["prompt_tokens"] < counts[1]
    refused = http.post("/tokenize", json={"messages": turns, "continue_final_message": True})
    assert refused.json()["error"]["param"] == "continue_final_message"


def test_the_documentation_lists_every_field_that_passes() -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    listed = page.split("### Fields that pass")[1].split("\n## ")[0]
    for table in (BODY, MESSAGE_FIELDS, PART, MERGED, PART_OF_MIXTURE):
        for name in {*table.inert, *table.unread}:
            assert f"`{name}`" in listed or f".{name}`" in listed, name


def test_no_reasoning_is_told_to_the_template(files: Files, http: httpx.Client) -> None:
    directory = files.adapters / "thinking"
    shutil.copytree(files.adapters / "templated", directory)
    template = "{{ 'off' if enable_thinking is defined and not enable_thinking else 'thinks' }}"
    (directory / "chat_template.jinja").write_text(template)
    http.post("/adapters", json={"name": "thinking", "src": "thinking"}).raise_for_status()
    try:
        body = {**CHAT, "model": "thinking"}
        tokens = {
            str(extra): http.post("/v1/chat/completions", json={**body, **extra}).json()["usage"][
                "prompt_tokens"
            ]
            for extra in (
                {},
                {"reasoning_effort": "none"},
                {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            )
        }
        counts = [
            http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["count"]
            for text in ("thinks", "off", "thinks")
        ]
        assert [*tokens.values()] == counts
        assert counts[0] != counts[1]
    finally:
        http.delete("/adapters/thinking").raise_for_status()
        shutil.rmtree(directory)
