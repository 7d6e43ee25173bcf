"""Mixtures in requests: as a model's name spells them, beside it, and as LoRAX writes them; streamed or not."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.api.running import BASE, Files, Running, running

TEXT = "a:0.7+b:-0.4"
PARTS = [{"name": "a", "weight": 0.7}, {"name": "b", "weight": -0.4}]
MERGED = {"ids": ["a", "b"], "weights": [0.7, -0.4], "merge_strategy": "linear", "density": 0}
WAYS: dict[str, dict[str, Any]] = {
    "spelled": {"model": TEXT},
    "beside": {"model": BASE, "adapters": PARTS},
    "in another order": {"model": BASE, "adapters": PARTS[::-1]},
    "as LoRAX": {"model": BASE, "merged_adapters": MERGED},
    "named": {"model": "mixed"},
}
CHAT: dict[str, object] = {
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 12,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 2,
}
COMPLETION: dict[str, object] = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "logprobs": 2}
KINDS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


@pytest.fixture(autouse=True)
def _a_named_one(server: Running, http: httpx.Client) -> Iterator[None]:
    mixture = [{"adapter": part["name"], "weight": part["weight"]} for part in PARTS]
    http.post("/adapters", json={"name": "mixed", "mixture": mixture}).raise_for_status()
    yield
    http.delete("/adapters/mixed").raise_for_status()


def ask(http: httpx.Client, path: str = "/v1/completions", **fields: object) -> httpx.Response:
    return http.post(path, json={**KINDS[path], **fields})


def choices(response: httpx.Response) -> object:
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def streamed(response: httpx.Response) -> list[dict[str, object]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def text_of(events: list[dict[str, object]]) -> str:
    found = ""
    for event in events:
        for choice in event["choices"]:  # type: ignore[attr-defined]
            found += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return found


# What is computed


@pytest.mark.parametrize("path", KINDS)
def test_every_way_to_ask_for_a_mixture_gets_the_same(http: httpx.Client, path: str) -> None:
    answers = {way: choices(ask(http, path, **fields)) for way, fields in WAYS.items()}
    assert all(answer == answers["spelled"] for answer in answers.values())
    others = (BASE, "a", "b", "a:0.7+b:0.4", "a+b")
    assert answers["spelled"] not in [choices(ask(http, path, model=other)) for other in others]


@pytest.mark.parametrize("path", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_says_what_an_answer_says(http: httpx.Client, path: str, way: str) -> None:
    whole = ask(http, path, **WAYS[way]).json()["choices"][0]
    events = streamed(ask(http, path, **WAYS[way], stream=True))
    assert text_of(events) == (whole["text"] if "text" in whole else whole["message"]["content"])


def test_n_seed_and_stop_hold_for_a_mixture(http: httpx.Client) -> None:
    sampled: dict[str, Any] = {"model": TEXT, "temperature": 1, "seed": 5, "n": 3, "logprobs": None}
    three = choices(ask(http, **sampled))
    assert three == choices(ask(http, **sampled))
    assert len({choice["text"] for choice in three}) > 1  # type: ignore[attr-defined]
    text = ask(http, model=TEXT).json()["choices"][0]["text"]
    stopped = ask(http, model=TEXT, stop=text[3:5]).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[3:5])], "stop")


def test_one_part_with_weight_1_is_that_adapter_cache_and_all(http: httpx.Client) -> None:
    long: dict[str, Any] = {"prompt": list(range(40, 90)), "logprobs": None}
    ask(http, model="a", **long).raise_for_status()
    for asked in ("a:1", "a:1+b:0"):
        usage = ask(http, model=asked, **long).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 48
    other = ask(http, model="a:0.5", **long).json()["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_same_parts_in_any_order_share_the_prefix_cache(http: httpx.Client) -> None:
    long: dict[str, Any] = {"prompt": list(range(140, 190)), "logprobs": None}
    ask(http, model="a:0.25+b", **long).raise_for_status()
    others: list[dict[str, Any]] = [
        {"model": "b:1+a:0.25"},
        {"model": BASE, "adapters": [{"name": "b"}, {"name": "a", "weight": 0.25}]},
    ]
    for fields in others:
        usage = ask(http, **fields, **long).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 48


def test_weights_of_0_leave_the_base(http: httpx.Client) -> None:
    assert choices(ask(http, model="a:0+b:-0.0")) == choices(ask(http, model=BASE))


@pytest.mark.parametrize("name", ["team/a:2", "a:0.5"])
def test_a_registered_name_is_that_name_whatever_it_looks_like(http: httpx.Client, name: str) -> None:
    http.post("/adapters", json={"name": name, "src": "c"}).raise_for_status()
    try:
        plain = ask(http, model=name)
        assert choices(plain) == choices(ask(http, model="c"))
        assert "adapters" not in plain.json()
        weighed = ask(http, model=f"{name}:0.5+b")
        assert weighed.json()["adapters"][0] == {**weighed.json()["adapters"][0], "name": name, "weight": 0.5}
    finally:
        http.delete(f"/adapters/{name}").raise_for_status()


# What is told


@pytest.mark.parametrize("path", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_answer_says_what_was_asked_and_what_answered(http: httpx.Client, path: str, way: str) -> None:
    now = {name: http.get(f"/adapters/{name}").json() for name in "ab"}
    asked = ("b", "a") if way == "in another order" else ("a", "b")
    weights = {"a": 0.7, "b": -0.4}
    parts = [
        {"name": name, "id": now[name]["id"], "version": now[name]["version"], "weight": weights[name]}
        for name in asked
    ]
    header = "+".join("{name}@{version}#{id}:{weight}".format(**part) for part in parts)
    whole = ask(http, path, **WAYS[way])
    assert (whole.json()["model"], whole.json()["adapters"]) == (WAYS[way]["model"], parts)
    assert whole.headers["x-manylora-adapters"] == header
    stream = ask(http, path, **WAYS[way], stream=True, n=2, stream_options={"include_usage": True})
    first, *others = streamed(stream)
    assert first["adapters"] == parts
    assert not any("adapters" in event for event in others)
    assert {event["model"] for event in (first, *others)} == {WAYS[way]["model"]}
    assert stream.headers["x-manylora-adapters"] == header


def test_weights_are_told_with_the_fewest_digits_of_a_float32(http: httpx.Client) -> None:
    answer = ask(
        http, model=BASE, adapters=[{"name": "a", "weight": 0.1 + 0.2}, {"name": "b", "weight": 1e-20}]
    )
    assert [part["weight"] for part in answer.json()["adapters"]] == [0.3, 1e-20]
    assert answer.headers["x-manylora-adapters"].endswith(":1e-20")


def test_weights_that_overflow_are_the_clients_fault(http: httpx.Client) -> None:
    refused = ask(http, model="a:1e30+b:1e30")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_mixture")
    assert "smaller" in refused.json()["error"]["message"]
    assert ask(http, model="a+b").status_code == 200


@pytest.mark.parametrize("model", [BASE, "a"])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_told_of_parts_where_there_are_none(http: httpx.Client, model: str, stream: bool) -> None:
    answer = ask(http, model=model, stream=stream)
    assert '"adapters"' not in answer.text
    assert "x-manylora-adapters" not in answer.headers


def test_a_browser_may_read_the_header(files: Files, tmp_path_factory: pytest.TempPathFactory) -> None:
    origin = "https://app.example"
    with running(files, tmp_path_factory.mktemp("cors"), cors_origin=origin) as server:
        answer = httpx.get(f"{server.url}/health", headers={"origin": origin})
        assert "x-manylora-adapters" in answer.headers["access-control-expose-headers"]


def test_openais_client_needs_nothing_but_the_name(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=TEXT, messages=[{"role": "user", "content": "hi"}], max_tokens=6
    )
    assert whole.model == TEXT
    assert [part["name"] for part in whole.model_extra["adapters"]] == ["a", "b"]  # type: ignore[index]
    beside = client.completions.create(model=BASE, prompt="hi", max_tokens=6, extra_body={"adapters": PARTS})
    assert beside.choices[0].finish_reason in ("stop", "length")


# Other routes that a model is named to


def test_tokenize_and_detokenize_take_them(http: httpx.Client) -> None:
    for fields in WAYS.values():
        assert http.post("/tokenize", json={**fields, "prompt": "hello"}).json()["count"] == 5
        assert http.post("/detokenize", json={**fields, "tokens": [104, 105]}).status_code == 200
    for route, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        refused = http.post(route, json={"adapters": [{"name": "nobody"}], **body})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "adapters")


def test_models_describes_a_mixture_that_a_request_could_spell(http: httpx.Client) -> None:
    found = http.get(f"/v1/models/{TEXT}").json()
    assert (found["id"], found["parent"], found["root"]) == (TEXT, BASE, TEXT)
    assert found["mixture"] == [{"adapter": "a", "weight": 0.7}, {"adapter": "b", "weight": -0.4}]
    assert http.get("/v1/models/a:0.7+nobody").json()["error"]["code"] == "model_not_found"
    assert http.get("/v1/models/a:0.7+a").json()["error"]["code"] == "invalid_mixture"
