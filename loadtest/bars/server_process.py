"""A `manylora serve` in a process of its own: started, watched from outside, ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_SECONDS = 180.0
END_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server; ``url`` is where it listens."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    data_dir: Path

    def resident_bytes(self) -> int:
        """Return the memory that the process has now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stored_files(self) -> int:
        """Return how many files the adapter stores below the data directory hold, staged ones included."""
        return sum(path.is_file() for path in self.data_dir.glob("*/adapters/**/*"))

    def wait_until_ready(self) -> None:
        """Return when /ready says so. Raises RuntimeError with the end of the log if it never does."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the server did not become ready:\n{self.log_tail()}")

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Let it drain; kill it if it doesn't."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self, characters: int = 4000) -> str:
        """Return the end of what it printed."""
        return self.log.read_text(errors="replace")[-characters:]


def start_server(base: Path, directory: Path, arguments: Sequence[str] = ()) -> ServerProcess:
    """Start a server with its data and its log below ``directory``; don't wait for it."""
    directory.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    log, data = directory / f"server-{port}.log", directory / "data"
    command = [sys.executable, "-m", "manylora", "serve", str(base), "--port", str(port)]
    command += ["--data-dir", str(data), "--log-level", "warning", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    return ServerProcess(f"http://127.0.0.1:{port}", process, log, data)


@contextlib.contextmanager
def running(*servers: ServerProcess) -> Iterator[None]:
    """Wait until all are ready; end them with the block."""
    try:
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
