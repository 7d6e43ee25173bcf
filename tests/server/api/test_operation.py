"""What operators see: health, readiness, request ids, the API's own documentation."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from manylora.server.engine.health import Health
from tests.server.api.running import BASE, Files, Running, running

COMPLETION = {"model": BASE, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
UUID = re.compile(r"[0-9a-f]{32}")


def complete(http: httpx.Client, **change: object) -> httpx.Response:
    return http.post("/v1/completions", json={**COMPLETION, **change})


# Health and readiness


def test_a_server_is_alive_and_ready(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "alive"}
    assert http.get("/ready").json() == {"status": "ready"}


def test_after_three_failed_steps_it_is_not_ready_until_one_goes_well(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The engine would ask its base a millisecond later, and be ready again before anybody looks.
    monkeypatch.setattr(Health, "take_probe", lambda self, now: None)
    assert complete(http).status_code == 200
    with server.failing(RuntimeError("x")):
        assert [complete(http).status_code for _ in range(3)] == [500] * 3
    unready = http.get("/ready")
    assert unready.status_code == 503
    assert unready.json() == {"status": "not ready", "reason": "the last 3 steps failed"}
    assert http.get("/health").status_code == 200
    assert complete(http).status_code == 200
    assert http.get("/ready").status_code == 200


def test_while_it_drains_running_requests_finish_and_new_ones_are_sent_away(
    files: Files, tmp_path: Path
) -> None:
    with running(files, tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        whole = complete(http, max_tokens=300).json()["choices"][0]["text"]
        with ThreadPoolExecutor(1) as pool, server.held():
            under_way = pool.submit(complete, http, max_tokens=300)
            server.wait_until_busy()
            draining = server.start(server.server.engine.drain(30))
            server.wait_until("draining", lambda: http.get("/ready").status_code == 503)
            assert http.get("/ready").json()["reason"] == "the server drains"
            late = complete(http)
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "shutting_down"
            assert int(late.headers["retry-after"]) > 0
            assert http.get("/health").status_code == 200
        assert under_way.result().json()["choices"][0]["text"] == whole
        draining.result(30)


# Request ids


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/v1/models/nobody", "/metrics"])
def test_every_answer_has_a_request_id(http: httpx.Client, path: str) -> None:
    assert UUID.fullmatch(http.get(path).headers["x-request-id"])
    assert http.get(path, headers={"x-request-id": "trace-1.a_b"}).headers["x-request-id"] == "trace-1.a_b"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "é"])
def test_a_request_id_that_is_not_sane_is_replaced(http: httpx.Client, given: str) -> None:
    answer = http.get("/v1/models", headers=[(b"x-request-id", given.encode())])
    assert UUID.fullmatch(answer.headers["x-request-id"])


def test_one_request_id_may_be_in_use_twice(server: Running, http: httpx.Client) -> None:
    headers = {"x-request-id": "same"}
    body = {**COMPLETION, "stream": True, "max_tokens": 200}
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as first:
        assert http.post("/v1/completions", json=COMPLETION, headers=headers).status_code == 200
        assert first.read().endswith(b"data: [DONE]\n\n")


# Tokens and documentation


def test_tokens_go_there_and_back(http: httpx.Client) -> None:
    text = "hello wörld, 日本 🦙"
    tokens = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 1024
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"model": "a", "messages": [{"role": "user", "content": text}]}).json()
    assert chat["count"] > tokens["count"]
    assert chat["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": []}, 400),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, 404),
        ("/detokenize", {"tokens": [320]}, 400),
        ("/detokenize", {"tokens": ["x"]}, 400),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404),
    ],
)
def test_bad_token_requests_are_refused(
    http: httpx.Client, path: str, body: dict[str, object], status: int
) -> None:
    assert http.post(path, json=body).status_code == status


def test_the_documentation_shows_routes_and_bodies(http: httpx.Client) -> None:
    assert "swagger" in http.get("/docs").text.lower()
    paths = http.get("/openapi.json").json()["paths"]
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/adapters",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/health",
        "/ready",
        "/metrics",
    } <= set(paths)
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "temperature", "stop", "logprobs"} <= set(body["properties"])
    assert set(body["required"]) == {"model", "messages"}
    assert "$ref" not in str(body)
