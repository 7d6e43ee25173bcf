"""When the engine can't go on, /ready says so, and whoever asks for something is told instead of left waiting."""

from collections.abc import Iterator

import httpx
import pytest

from tests.server.api.running import SECONDS, Files, Running, running


@pytest.fixture(scope="module")
def dead(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose pools' books were found wrong."""
    with running(files, tmp_path_factory.mktemp("dead")) as server:
        httpx.post(f"{server.url}/adapters", json={"name": "a", "src": "a"}).raise_for_status()
        server.server.engine._engine.blocks._refs[-1] += 1  # no public door breaks the books
        with httpx.Client(base_url=server.url) as client:
            client.post("/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 2})
            server.wait_until("unready", lambda: client.get("/ready").status_code == 503)
        yield server


def test_it_is_alive_but_not_ready(dead: Running) -> None:
    assert httpx.get(f"{dead.url}/health").status_code == 200
    assert "internal check" in httpx.get(f"{dead.url}/ready").json()["reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_requests_get_a_500(dead: Running, stream: bool) -> None:
    body = {"model": "a", "prompt": "x", "max_tokens": 2, "stream": stream}
    response = httpx.post(f"{dead.url}/v1/completions", json=body, timeout=SECONDS)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "step_failed"


def test_changes_to_adapters_get_a_500_and_leave_the_registry_as_it_was(dead: Running) -> None:
    with httpx.Client(base_url=dead.url, timeout=SECONDS) as client:
        assert client.post("/adapters", json={"name": "b", "src": "b"}).status_code == 500
        assert client.put("/adapters/a", json={"src": "c"}).status_code == 500
        listed = client.get("/adapters").json()["data"]
        assert [(adapter["name"], adapter["version"]) for adapter in listed] == [("a", 1)]
        assert client.get("/metrics").status_code == 200
