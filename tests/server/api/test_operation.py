"""What operators see: health, readiness, request ids, log lines, metrics, the API's own documentation."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from tests.server.api.running import BASE, Files, Running, running

COMPLETION = {"model": BASE, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
UUID = re.compile(r"[0-9a-f]{32}")


def samples(http: httpx.Client) -> dict[str, float]:
    """Return all samples of /metrics by name and labels."""
    found = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def complete(http: httpx.Client, **change: object) -> httpx.Response:
    return http.post("/v1/completions", json={**COMPLETION, **change})


# Health and readiness


def test_a_server_is_alive_and_ready(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "alive"}
    assert http.get("/ready").json() == {"status": "ready"}


def test_after_three_failed_steps_it_is_not_ready_until_one_goes_well(
    server: Running, http: httpx.Client
) -> None:
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


def test_log_lines_carry_the_request_id_and_probes_are_not_logged(http: httpx.Client) -> None:
    with capture_logs(processors=[merge_contextvars]) as lines:
        http.get("/health")
        http.get("/metrics")
        answer = complete(http, model="nobody")
    [line] = lines
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 404)
    assert line["seconds"] > 0


# Metrics


def test_metrics_move(http: httpx.Client) -> None:
    before = samples(http)
    assert complete(http, model="a", prompt="metrics, asked twice: a prompt over a block").status_code == 200
    assert complete(http, model="a", prompt="metrics, asked twice: a prompt over a block").status_code == 200
    after = samples(http)
    moved = {name: after[name] - before.get(name, 0) for name in after}
    for name in ("time_to_first_token", "request", "queue"):
        assert moved[f"manylora_{name}_seconds_count{{}}"] == 2
        assert moved[f"manylora_{name}_seconds_sum{{}}"] > 0
    assert moved["manylora_time_between_tokens_seconds_count{}"] == 6
    assert moved["manylora_step_seconds_count{}"] >= 8
    assert moved["manylora_requests_total{adapter=a,outcome=finished}"] == 2
    assert moved["manylora_tokens_total{adapter=a,kind=generated}"] == 8
    assert moved["manylora_tokens_total{adapter=a,kind=prompt}"] > 60
    assert moved["manylora_prefix_cache_hit_tokens_total{}"] >= 16
    assert moved["manylora_prefix_cache_queried_tokens_total{}"] > 60
    assert after["manylora_preemptions_total{}"] >= 0


def test_gauges_say_what_is_held(server: Running, http: httpx.Client) -> None:
    complete(http, model="a")
    idle = samples(http)
    assert idle["manylora_requests_running{}"] == idle["manylora_requests_waiting{}"] == 0
    assert idle["manylora_kv_blocks{state=used}"] == 0
    assert idle["manylora_arena_rows{module=q_proj,state=used}"] >= 8
    assert sum(idle[f"manylora_adapters{{tier={tier}}}"] for tier in ("device", "host", "disk")) == 3
    with http.stream("POST", "/v1/completions", json={**COMPLETION, "max_tokens": 900, "stream": True}):
        server.wait_until_busy()
        busy = samples(http)
    assert busy["manylora_requests_running{}"] == 1
    assert busy["manylora_kv_blocks{state=used}"] > 0


def test_adapter_operations_are_timed(http: httpx.Client) -> None:
    before = samples(http)
    http.post("/adapters", json={"name": "timed", "src": "b", "preload": True}).raise_for_status()
    http.put("/adapters/timed", json={"src": "c"}).raise_for_status()
    http.delete("/adapters/timed").raise_for_status()
    after = samples(http)
    for operation in ("register", "swap", "place"):
        name = f"manylora_adapter_load_seconds_count{{operation={operation}}}"
        assert after[name] > before.get(name, 0)


def test_routers_find_adapters_by_vllms_gauge(http: httpx.Client) -> None:
    complete(http, model="a")
    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    [sample] = families["vllm:lora_requests_info"].samples
    assert set(sample.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert "a" in sample.labels["running_lora_adapters"].split(",")
    assert sample.labels["waiting_lora_adapters"] == ""
    assert int(sample.labels["max_lora"]) >= 3
    assert abs(sample.value - time.time()) < 60


@pytest.fixture
def two_labels(files: Files, tmp_path: Path) -> Iterator[Running]:
    with running(files, tmp_path, max_adapter_labels=2) as server:
        yield server


def test_only_so_many_adapters_have_labels(two_labels: Running) -> None:
    with httpx.Client(base_url=two_labels.url, timeout=30) as http:
        for name in ("a", "b", "c"):
            http.post("/adapters", json={"name": name, "src": name}).raise_for_status()
            complete(http, model=name)
        complete(http)

        def labels() -> set[str]:
            found = re.findall(r'manylora_requests_total\{adapter="([^"]*)"', http.get("/metrics").text)
            return set(found)

        assert labels() == {"a", "b", "other", BASE}
        http.delete("/adapters/a").raise_for_status()
        assert labels() == {"b", "other", BASE}
        complete(http, model="c")
        assert labels() == {"b", "c", "other", BASE}


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
