"""/metrics: counts, times and gauges, by adapter and by route, with labels that stay few."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.api.running import BASE, Files, Running, asked, running

COMPLETION = {"model": BASE, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


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


def label_values(http: httpx.Client, label: str) -> set[str]:
    return set(re.findall(rf'[{{,]{label}="([^"]*)"', http.get("/metrics").text))


def test_requests_are_counted_by_route_and_status(files: Files, tmp_path: Path) -> None:
    settings = {"api_key": ("k",), "admin_key": "admin", "max_waiting": 1, "max_running": 1}
    with (
        running(files, tmp_path, **settings) as server,
        httpx.Client(base_url=server.url, timeout=30, headers={"authorization": "Bearer admin"}) as http,
        ThreadPoolExecutor(5) as pool,
    ):
        complete(http).raise_for_status()
        complete(http, model="nobody")
        complete(http, temprature=1)
        http.post("/v1/completions", json=COMPLETION, headers={"authorization": "Bearer wrong"})
        http.get("/v1/models/nobody")
        http.get("/adapters/one")
        http.delete("/adapters/two")
        http.get("/v1/made/up/by/a/client")
        http.request("PROPFIND", "/coffee")
        http.get("/v1/completions")
        http.get("/openapi.json")
        with server.held():
            first = pool.submit(complete, http)
            server.wait_until_busy()
            late = [pool.submit(complete, http) for _ in range(4)]
            server.wait_until("one sent away", lambda: any(each.done() for each in late))
        statuses = [each.result().status_code for each in (first, *late)]
        assert set(statuses) == {200, 429}
        found = samples(http)

        def count(method: str, route: str, status: int) -> float:
            return found[f"manylora_http_requests_total{{method={method},route={route},status={status}}}"]

        for status in (200, 429):
            assert count("POST", "/v1/completions", status) == statuses.count(status) + (status == 200)
        for status in (400, 401, 404):
            assert count("POST", "/v1/completions", status) == 1
        assert count("GET", "/v1/models/{model}", 404) == 1
        assert count("GET", "/adapters/{name}", 404) == 1
        assert count("DELETE", "/adapters/{name}", 404) == 1
        assert count("GET", "other", 404) == 1
        assert count("other", "other", 404) == 1
        assert count("GET", "/v1/completions", 405) == 1
        assert count("GET", "/openapi.json", 200) == 1


def test_a_client_that_left_is_counted_as_such(server: Running) -> None:
    name = "manylora_http_requests_total"
    labels = {"method": "POST", "route": "/v1/completions", "status": "499"}
    before = server.metric(name, **labels) or 0
    with server.held(), asked(server, {**COMPLETION, "max_tokens": 900}):
        server.wait_until_busy()
    server.wait_until("counted", lambda: server.metric(name, **labels) == before + 1)


def test_seconds_are_told_by_adapter(http: httpx.Client) -> None:
    before = samples(http)
    complete(http, model="a")
    complete(http, model="a")
    complete(http)
    after = samples(http)
    for kind in ("request", "time_to_first_token"):
        for adapter, count in (("a", 2), (BASE, 1)):
            name = f"manylora_adapter_{kind}_seconds_count{{adapter={adapter}}}"
            assert after[name] - before.get(name, 0) == count
        assert after[f"manylora_adapter_{kind}_seconds_sum{{adapter=a}}"] > 0


def test_a_deleted_adapter_has_no_series_left_even_if_nobody_waited_for_the_deletion(
    server: Running, http: httpx.Client
) -> None:
    http.post("/adapters", json={"name": "leaving", "src": "b"}).raise_for_status()
    complete(http, model="leaving")
    assert "leaving" in label_values(http, "adapter")
    body = {**COMPLETION, "model": "leaving", "max_tokens": 300}
    with ThreadPoolExecutor(1) as pool:
        with server.held():
            under_way = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=30)
            server.wait_until_busy()
            with asked(server, {}, "/adapters/leaving", method="DELETE"):
                server.wait_until("refused", lambda: http.get("/adapters/leaving").status_code == 404)
            assert "leaving" not in label_values(http, "adapter")
        assert under_way.result().status_code == 200
    server.wait_until_idle()
    assert "leaving" not in label_values(http, "adapter")


def test_the_process_and_the_build_are_told(http: httpx.Client) -> None:
    found = samples(http)
    assert found["process_resident_memory_bytes{}"] > 10 << 20
    assert found["process_cpu_seconds_total{}"] > 0
    assert found["process_open_fds{}"] > 3
    assert found["process_start_time_seconds{}"] < time.time()
    [build] = [name for name in found if name.startswith("manylora_build_info")]
    assert f"version={version('manylora')}" in build
    assert f"base_model={BASE}" in build
    assert found[build] == 1


def test_the_gateways_protocol_finds_its_gauges(server: Running, http: httpx.Client) -> None:
    idle = samples(http)
    blocks, kept = server.server.engine.snapshot().blocks, server.server.base.kv_dtype
    assert idle[f"vllm:cache_config_info{{block_size=16,cache_dtype={kept},num_gpu_blocks={blocks}}}"] == 1
    label = f"{{model_name={BASE}}}"
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert idle[f"vllm:{name}{label}"] == 0
    body = {**COMPLETION, "prompt": [5] * 160, "max_tokens": 800, "stream": True}
    with http.stream("POST", "/v1/completions", json=body):
        server.wait_until("computed", lambda: server.server.engine.snapshot().free_blocks <= blocks - 10)
        busy = samples(http)
    assert busy[f"vllm:num_requests_running{label}"] == 1
    assert 10 / blocks <= busy[f"vllm:kv_cache_usage_perc{label}"] <= 1
