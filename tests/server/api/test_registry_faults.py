"""Faults of the registry and of stored files through HTTP: the server's own, said as such, and felt by nobody else."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.api.running import Files, Running, running


@pytest.fixture
def own(files: Files, tmp_path: Path) -> Iterator[Running]:
    with running(files, tmp_path) as server:
        for name in ("a", "b"):
            made = httpx.post(f"{server.url}/adapters", json={"name": name, "src": name})
            made.raise_for_status()
        yield server


def database(own: Running) -> sqlite3.Connection:
    (path,) = own.server.deps.exports.directory.parent.glob("registry.db")  # type: ignore[union-attr]  # it has them
    return sqlite3.connect(path, isolation_level=None)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [("disk I/O error", 500, "storage_failed"), ("database or disk is full", 507, "store_full")],
)
def test_a_fault_of_the_registry_is_no_fault_of_the_adapter(
    own: Running, fault: str, status: int, code: str
) -> None:
    with contextlib.closing(database(own)) as other:
        for kind in ("INSERT", "UPDATE"):
            other.execute(
                f"CREATE TRIGGER fails_{kind} BEFORE {kind} ON adapters BEGIN SELECT RAISE(FAIL, '{fault}'); END"
            )
        for method, path, body in (
            ("POST", "/adapters", {"name": "new", "src": "c"}),
            ("PUT", "/adapters/a", {"src": "c"}),
        ):
            refused = httpx.request(method, own.url + path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (status, code), refused.text
        for kind in ("INSERT", "UPDATE"):
            other.execute(f"DROP TRIGGER fails_{kind}")
    assert httpx.put(f"{own.url}/adapters/a", json={"src": "c"}).status_code == 200


def test_what_is_unavailable_is_not_listed_as_a_model(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server:
        for name in ("a", "b"):
            httpx.post(f"{server.url}/adapters", json={"name": name, "src": name}).raise_for_status()
    stored = min(tmp_path.glob("*/adapters/*/*.safetensors"))
    whole = stored.read_bytes()
    stored.write_bytes(whole[: len(whole) // 2])
    with running(files, tmp_path) as server:
        models = {model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
        states = {each["name"]: each["state"] for each in httpx.get(f"{server.url}/adapters").json()["data"]}
        assert sorted(states.values()) == ["available", "unavailable"]
        assert models == {"tiny"} | {name for name, state in states.items() if state == "available"}
        (gone,) = (name for name, state in states.items() if state == "unavailable")
        body = {"model": gone, "prompt": "x", "max_tokens": 1}
        refused = httpx.post(f"{server.url}/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
        assert httpx.get(f"{server.url}/v1/models/{gone}").status_code == 503
        healed = httpx.post(f"{server.url}/adapters", json={"name": gone, "src": gone})
        assert healed.status_code == 200
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        assert gone in {model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
