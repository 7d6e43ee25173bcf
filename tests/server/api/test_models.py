"""GET /v1/models: what can be asked, and nothing else; and what each model object says."""

import shutil
import time
from pathlib import Path

import httpx
import pytest

from tests.server.api.running import BASE, Files, running


def test_each_model_says_what_it_is_and_since_when(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    models = {each["id"]: each for each in listed["data"]}
    assert [*models] == [BASE, "a", "b", "c"]
    for name, model in models.items():
        assert model == http.get(f"/v1/models/{name}").json()
        assert set(model) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
        assert (model["object"], model["owned_by"], model["max_model_len"]) == ("model", "manylora", 1024)
        assert model["parent"] == (None if name == BASE else BASE)
        assert 0 <= time.time() - model["created"] < 3600
    registered = {each["name"]: each["created"] for each in http.get("/adapters").json()["data"]}
    assert {name: models[name]["created"] for name in registered} == registered


def test_codex_finds_the_list_that_it_reads(http: httpx.Client) -> None:
    """Without one it doesn't go on to ask anything."""
    listed = http.get("/v1/models", params={"client_version": "0.156.0"}).json()
    assert listed.pop("models") == []
    assert listed == http.get("/v1/models").json()


def test_a_model_that_is_not_there_is_404_with_those_that_are(http: httpx.Client) -> None:
    missing = http.get("/v1/models/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert f"a, b, c, {BASE}" in missing.json()["error"]["message"]


@pytest.fixture
def without_files_of_b(files: Files, tmp_path: Path) -> Path:
    """The data directory of a server that served a and b, of which b's files are lost."""
    with running(files, tmp_path) as server:
        digests = {}
        for name in ("a", "b"):
            made = httpx.post(f"{server.url}/adapters", json={"name": name, "src": name})
            digests[name] = made.raise_for_status().json()["digest"]
    [directory] = tmp_path.rglob(digests["b"])
    shutil.rmtree(directory)
    return tmp_path


def test_what_is_unavailable_is_not_offered_and_says_why_when_it_is_asked(
    files: Files, without_files_of_b: Path
) -> None:
    with running(files, without_files_of_b) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == [BASE, "a"]
        shown = {each["name"]: each for each in http.get("/adapters").json()["data"]}
        assert (shown["a"]["state"], shown["a"]["reason"]) == ("available", None)
        assert (shown["b"]["state"], shown["b"]["tier"]) == ("unavailable", None)
        assert shown["b"]["reason"]
        asked = [
            http.get("/v1/models/b"),
            http.post("/v1/completions", json={"model": "b", "prompt": "x"}),
            http.post("/tokenize", json={"model": "b", "prompt": "x"}),
        ]
        for refused in asked:
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
            assert shown["b"]["reason"] in refused.json()["error"]["message"]
        # It is healed by its own weights, and offered again.
        http.post("/adapters", json={"name": "b", "src": "b"}).raise_for_status()
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == [BASE, "a", "b"]


def test_a_model_that_goes_is_not_offered_any_more(http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "passing", "src": "b"}).raise_for_status()
    assert "passing" in http.get("/v1/models").text
    http.delete("/adapters/passing").raise_for_status()
    assert "passing" not in http.get("/v1/models").text
    assert http.get("/v1/models/passing").status_code == 404
