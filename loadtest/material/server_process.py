"""A server in a process of its own, `manylora serve` or another: started, watched from outside, ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
    ready_path: str = "/ready"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        url = httpx.URL(self.url)
        return url.host, url.port or 80

    def resident_bytes(self) -> int:
        """Return the memory that the process has now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def event_loop_seconds(self) -> float:
        """Return the processor time of its event loop until now: HTTP, JSON and SSE. It runs in the main thread."""
        threads = psutil.Process(self.process.pid).threads()
        return sum(each.user_time + each.system_time for each in threads if each.id == self.process.pid)

    def stored_files(self) -> int:
        """Return how many files the adapter stores below the data directory hold, staged ones included."""
        return sum(path.is_file() for path in self.data_dir.glob("*/adapters/**/*"))

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Return when ``ready_path`` answers 200. Raises RuntimeError with the end of the log if it never does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            # A client for each look would take a good part of a core from what starts.
            with contextlib.suppress(OSError, httpx.TransportError):
                socket.create_connection(self.address, timeout=5).close()
                if httpx.get(self.url + self.ready_path, timeout=5).status_code == 200:
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the server did not become ready:\n{self.log_tail()}")

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()

    def interrupt(self) -> None:
        """Do what Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def end(self, seconds: float = END_SECONDS) -> None:
        """Let it drain; kill it if it doesn't."""
        if self.process.poll() is None:
            self.interrupt()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self, characters: int = 4000) -> str:
        """Return the end of what it printed."""
        return self.log.read_text(errors="replace")[-characters:]


def command(*arguments: str) -> list[str]:
    """Return the command line of `manylora` in this interpreter."""
    return [sys.executable, "-m", "manylora", *arguments]


def environment_of_children() -> dict[str, str]:
    """Return this environment without settings of a server that somebody else runs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}


def start_server(base: Path | None, directory: Path, arguments: Sequence[str] = ()) -> ServerProcess:
    """Start a server (None: of the demo) with its data and its log below ``directory``; don't wait for it."""
    directory.mkdir(parents=True, exist_ok=True)
    port, data = free_port(), directory / "data"
    model = () if base is None else (str(base),)
    line = command("serve", *model, *arguments, "--port", str(port), "--data-dir", str(data))
    return start_line(line, environment_of_children(), port, directory, "/ready")


def start_line(
    line: Sequence[str], environment: Mapping[str, str], port: int, directory: Path, ready_path: str
) -> ServerProcess:
    """Start any server by its command line, which names ``port``; don't wait for it."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"server-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, env=dict(environment))
    return ServerProcess(f"http://127.0.0.1:{port}", process, log, directory / "data", ready_path)


@contextlib.contextmanager
def running(
    *servers: ServerProcess, start_seconds: float = START_SECONDS, end_seconds: float = END_SECONDS
) -> Iterator[None]:
    """Wait until all are ready; end them with the block. Raises RuntimeError if one doesn't start."""
    try:
        for server in servers:
            server.wait_until_ready(start_seconds)
        yield
    finally:
        for server in servers:
            server.end(end_seconds)


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
