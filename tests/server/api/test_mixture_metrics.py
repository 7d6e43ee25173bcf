"""What /metrics says of mixtures: under their names, or all together, and by part; with labels that stay few."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.api.running import BASE, Files, Running, running

Counts = dict[str, float]


def counts(http: httpx.Client, name: str, **labels: str) -> Counts:
    """Return what a metric's samples with these labels are, by adapter."""
    found: Counts = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and sample.labels.items() >= labels.items():
                found[sample.labels["adapter"]] = sample.value
    return found


@pytest.fixture
def own(files: Files, tmp_path: Path) -> Iterator[httpx.Client]:
    with running(files, tmp_path, max_adapter_labels=3) as server, _client(server) as http:
        for name in "ab":
            http.post("/adapters", json={"name": name, "src": name}).raise_for_status()
        yield http


def _client(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=30)


def make(http: httpx.Client, name: str, *parts: str) -> None:
    mixture = [{"adapter": part, "weight": 0.5} for part in parts]
    http.post("/adapters", json={"name": name, "mixture": mixture}).raise_for_status()


def ask(http: httpx.Client, model: str, **more: object) -> None:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True, **more}
    http.post("/v1/completions", json=body).raise_for_status()


def test_a_named_one_counts_under_its_name_and_all_others_together(own: httpx.Client) -> None:
    make(own, "mixed", "a", "b")
    ask(own, "mixed")
    ask(own, "a:0.5+b:0.5")
    ask(own, "a:0.25+b")
    ask(own, BASE, adapters=[{"name": "b", "weight": 3}])
    assert counts(own, "manylora_requests_total") == {"mixed": 1, "mixture": 3}
    assert counts(own, "manylora_tokens_total", kind="generated") == {"mixed": 2, "mixture": 6}
    assert counts(own, "manylora_tokens_total", kind="prompt") == {"mixed": 3, "mixture": 9}
    for name in ("request", "time_to_first_token"):
        assert counts(own, f"manylora_adapter_{name}_seconds_count") == {"mixed": 1, "mixture": 3}


def test_what_is_an_adapter_itself_counts_as_that(own: httpx.Client) -> None:
    ask(own, "a:1")
    ask(own, BASE, adapters=[{"name": "a"}, {"name": "b", "weight": 0}])
    assert counts(own, "manylora_requests_total") == {"a": 2}


def test_parts_are_counted_by_adapter(own: httpx.Client) -> None:
    make(own, "mixed", "a", "b")
    ask(own, "mixed", prompt=[[5], [6], [7]])
    ask(own, "a:0.5+b:0")
    ask(own, "a")
    assert counts(own, "manylora_mixture_parts_total") == {"a": 4, "b": 3}
    refused = own.post("/v1/completions", json={"model": "mixed", "prompt": "x", "max_tokens": 5000})
    assert refused.status_code == 400
    assert counts(own, "manylora_mixture_parts_total") == {"a": 4, "b": 3}


def test_mixtures_share_the_labels_with_adapters(own: httpx.Client) -> None:
    make(own, "one", "a")
    make(own, "two", "b")
    for model in ("a", "one", "b", "two", "a:0.1"):
        ask(own, model)
    assert set(counts(own, "manylora_requests_total")) == {"a", "one", "b", "other", "mixture"}
    own.delete("/adapters/one").raise_for_status()
    assert set(counts(own, "manylora_requests_total")) == {"a", "b", "other", "mixture"}
    ask(own, "two")
    found = counts(own, "manylora_requests_total")
    assert set(found) == {"a", "b", "other", "mixture", "two"}, "its place is free"
    assert set(counts(own, "manylora_mixture_parts_total")) == {"a", "b"}


@pytest.mark.parametrize("name", ["mixture", "other"])
def test_what_is_named_like_a_label_is_told_apart(own: httpx.Client, name: str) -> None:
    own.post("/adapters", json={"name": name, "src": "a"}).raise_for_status()
    ask(own, name)
    ask(own, "a:0.5+b:0.5")
    ask(own, f"{name}:0.5")
    assert counts(own, "manylora_requests_total") == {f"={name}": 1, "mixture": 2}
    assert counts(own, "manylora_mixture_parts_total") == {"a": 1, "b": 1, f"={name}": 1}
    own.delete(f"/adapters/{name}").raise_for_status()
    assert counts(own, "manylora_requests_total") == {"mixture": 2}
    make(own, name, "b")
    ask(own, name)
    assert counts(own, "manylora_requests_total")[f"={name}"] == 1
    assert counts(own, "manylora_requests_total")["mixture"] == 2
