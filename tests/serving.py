"""Starts a real `manylora serve` in a process of its own, for tests that speak HTTP to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter, write_base
from manylora.loadtest.material.server_process import ServerProcess, start_server

Served = ServerProcess
START_SECONDS = 120.0


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[Served]:
    """Run `manylora serve` with its data and log below ``directory`` until the block ends."""
    server = start_server(None, directory, arguments)
    try:
        server.wait_until_ready(START_SECONDS)
        yield server
    finally:
        server.kill()


def write_two_adapters(root: Path) -> Path:
    """Write a base, and two adapters, one and two, below adapters/."""
    base = write_base(root / "base")
    for number, name in enumerate(("one", "two")):
        write_adapter(root / "adapters" / name, base, AdapterShape(rank=4 << number, seed=number))
    return root


def answer(server: Served, model: str, prompt: str = "hello") -> str:
    """Return a short greedy answer and its log probabilities: noise's text is often no text at all."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    return f"{choice['text']} {choice['logprobs']['token_logprobs']}"
