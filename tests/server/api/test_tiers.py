"""Adapters on disk are read from when a request names them, and their weights go to the engine with each request."""

from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import pytest

from manylora.server.engine.request import GenerationRequest
from tests.server.api.running import BASE, Files, Running, running


def tier(server: Running, name: str) -> str:
    return str(httpx.get(f"{server.url}/adapters/{name}").json()["tier"])


def test_an_adapter_is_read_before_its_request_is_queued(files: Files, tmp_path: Path) -> None:
    """Even if that turns out to be one that can't be: its prompt was looked at later."""
    with running(files, tmp_path) as server:
        httpx.post(f"{server.url}/adapters", json={"name": "a", "src": "a"}).raise_for_status()
    with running(files, tmp_path) as server, server.client() as client:
        assert tier(server, "a") == "disk"
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="a", prompt=[1] * 5000, max_tokens=1)
        server.wait_until("read", lambda: tier(server, "a") == "host")
        assert client.completions.create(model="a", prompt="x", max_tokens=1).choices
        assert server.metric("manylora_adapter_load_seconds_count", operation="read") == 1
        assert tier(server, "a") == "device"
        assert server.metric("manylora_adapter_queue_seconds_count", adapter="a") == 1


def test_weights_of_adapters_reach_the_engine(files: Files, tmp_path: Path) -> None:
    with (
        running(files, tmp_path, adapter_weight=("a=3", f"{BASE}=0.5")) as server,
        server.client() as client,
    ):
        for name in ("a", "b"):
            httpx.post(f"{server.url}/adapters", json={"name": name, "src": name}).raise_for_status()
        engine, seen = server.server.engine, dict[str, float]()
        submit = engine.submit_together

        def watched(requests: Sequence[GenerationRequest]) -> object:
            seen.update({request.adapter_label: request.share for request in requests})
            return submit(requests)

        engine.submit_together = watched  # type: ignore[method-assign,assignment]
        for name in ("a", "b", BASE):
            client.completions.create(model=name, prompt="x", max_tokens=1)
        assert seen == {"a": 3.0, "b": 1.0, BASE: 0.5}
