"""Starts a real `manylora serve` in a process of its own, for tests that speak HTTP to it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 120.0


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def interrupt(self) -> None:
        """Do what Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[Served]:
    """Run `manylora serve` with its data and log below ``directory`` until the block ends."""
    port = free_port()
    log = directory / f"server-{port}.log"
    command = [sys.executable, "-m", "manylora", "serve", *arguments, "--port", str(port)]
    if "--data-dir" not in arguments:
        command += ["--data-dir", str(directory / "data")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    served = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_ready(served)
        yield served
    finally:
        process.kill()
        process.wait()


def wait_until_ready(served: Served) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if served.process.poll() is not None:
            break
        try:
            if httpx.get(f"{served.url}/ready", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the server did not become ready:\n{served.log.read_text()}")
