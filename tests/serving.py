"""Starts a real `manylora serve` in a process of its own, for tests that speak HTTP to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manylora.loadtest.server_process import ServerProcess, start_server

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
