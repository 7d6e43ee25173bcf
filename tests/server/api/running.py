"""A true server in a thread of the test's own process: engine, catalog, tokenizer, uvicorn, a port of its own.

In the same process, so that a test can look at the pools, hold the engine back and make a step fail.
"""

import asyncio
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import openai
import uvicorn
import uvloop
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from manylora.assemble import Server, assemble
from manylora.descriptors import connection_limits
from manylora.listening import bind
from manylora.loadtest.material.checkpoints import TINY, AdapterShape, write_adapter, write_base
from manylora.server.api.connections import http_config
from manylora.server.config import ServeSettings

T = TypeVar("T")
Line = MutableMapping[str, object]
BASE = "tiny"
SECONDS = 30.0
"""How long a test waits for something that happens within milliseconds, unless it never does."""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %} END"
"""The chat template of the adapter "templated"."""


@dataclass(frozen=True)
class Files:
    """A base and adapters on disk: a (all linear, rank 8), b (rank 4), c (rank 16), templated (as a)."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"


def write_files(root: Path) -> Files:
    files = Files(root)
    write_base(files.base, TINY)
    all_linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    shapes = {
        "a": AdapterShape(rank=8, targets=all_linear, seed=1),
        "b": AdapterShape(rank=4, seed=2),
        "c": AdapterShape(rank=16, targets=("o_proj", "down_proj"), seed=3),
        "templated": AdapterShape(rank=8, targets=all_linear, seed=1),
    }
    for name, shape in shapes.items():
        write_adapter(files.adapters / name, files.base, shape)
    (files.adapters / "templated" / "chat_template.jinja").write_text(TEMPLATE)
    return files


class Running:
    """A server under way. Methods may be called from the test's thread."""

    def __init__(
        self, server: Server, http: uvicorn.Server, loop: asyncio.AbstractEventLoop, port: int, adapters: Path
    ) -> None:
        self.server = server
        self._http = http
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.adapters = adapters
        self._loop = loop

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    def on_loop(self, call: Callable[[], T]) -> T:
        """Run ``call`` on the server's event loop."""

        async def run() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(SECONDS)

    def start(self, work: Coroutine[object, object, object]) -> "Future[object]":
        """Run a coroutine on the server's event loop until it ends or the result is cancelled."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def check_integrity(self) -> None:
        """Hold the pools' books against each other."""
        asyncio.run_coroutine_threadsafe(self.server.engine.check_integrity(), self._loop).result(SECONDS)

    @contextmanager
    def held(self, error: Exception | None = None) -> Iterator[threading.Event]:
        """Hold the engine in its next step until the event is set or the block ends; then it fails or goes on."""
        go_on = threading.Event()
        launch = self.server.base.decoder.launch

        def wait(*arguments: object) -> object:
            go_on.wait(SECONDS)
            if error is not None:
                raise error
            return launch(*arguments)  # type: ignore[arg-type]  # what the engine gave

        self.server.base.decoder.launch = wait  # type: ignore[method-assign,assignment]
        try:
            yield go_on
        finally:
            del self.server.base.decoder.launch
            go_on.set()

    @contextmanager
    def failing(self, error: Exception) -> Iterator[None]:
        """Let every step fail until the block ends."""

        def fail(*arguments: object) -> object:
            raise error

        self.server.base.decoder.launch = fail  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del self.server.base.decoder.launch

    @contextmanager
    def broken_tokenizer(self) -> Iterator[None]:
        """Let chat templates fail in a way that nobody foresaw, until the block ends."""

        def fail(*arguments: object, **named: object) -> str:
            raise RuntimeError("secret detail")

        tokenizer = self.server.deps.tokenizer
        tokenizer.render = fail  # type: ignore[method-assign]
        try:
            yield
        finally:
            del tokenizer.render

    def metric(self, name: str, **labels: str) -> float | None:
        """Return one sample of /metrics, None if there is none."""
        registry = self.server.deps.metrics.registry
        return self.on_loop(lambda: registry.get_sample_value(name, labels))

    def wait_until(self, what: str, true: Callable[[], bool]) -> None:
        """Return as soon as ``true()``; fail after SECONDS."""
        deadline = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline, f"never {what}"
            time.sleep(0.002)

    @contextmanager
    def logged(self) -> Iterator[list[Line]]:
        """Collect the log lines of the block's requests.

        A line is written after its answer, so those of requests before are waited for.
        """
        self.wait_until("done with former requests", lambda: not self._http.server_state.tasks)
        with capture_logs(processors=[merge_contextvars]) as lines:
            yield lines

    def wait_until_busy(self) -> None:
        """Return when the engine computes something."""
        self.wait_until("busy", lambda: self.server.engine.snapshot().running > 0)

    def wait_until_idle(self) -> None:
        """Return when the engine holds nothing of any request."""

        def idle() -> bool:
            now = self.server.engine.snapshot()
            return (now.running, now.waiting, now.free_blocks) == (0, 0, now.blocks)

        self.wait_until("idle", idle)


class _Announcing(uvicorn.Server):
    """uvicorn, which says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


@contextmanager
def running(files: Files, data: Path, **settings: object) -> Iterator[Running]:
    """Serve ``files`` until the block ends; no adapter is registered."""
    given: dict[str, object] = {
        "base": str(files.base),
        "served_model_name": BASE,
        "data_dir": data,
        "adapter_root": files.adapters,
        "quantization": "none",
        "dtype": "float32",
        "kv_cache_gib": 0.02,
        "arena_rows": 128,
        "audit_after": 0.05,  # books that don't balance end a server of the tests
    }
    all_settings = ServeSettings(**{**given, **settings})
    started: queue.SimpleQueue[Running | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    async def serve() -> None:
        server = assemble(all_settings, files.base, BASE, lambda done, total: None)
        server.engine.start()
        await server.catalog.restore()
        limits = connection_limits(all_settings, 1 << 16)
        http = _Announcing(http_config(server.app, limits, drain_seconds=1))
        sockets = bind(ServeSettings(port=0))
        port = sockets[0].getsockname()[1]
        serving = asyncio.create_task(http.serve(sockets))
        await http.up.wait()
        started.put(Running(server, http, asyncio.get_running_loop(), port, files.adapters))
        await asyncio.to_thread(stop.wait)
        http.should_exit = True
        await serving
        await server.engine.stop()
        await server.catalog.close()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())
        except BaseException as error:
            started.put(error)
            raise

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        result = started.get(timeout=SECONDS)
        if isinstance(result, BaseException):
            raise result
        yield result
    finally:
        stop.set()
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def asked(
    server: Running, body: dict[str, object], route: str = "/v1/completions", method: str = "POST"
) -> Iterator[socket.socket]:
    """Send a request; hang up when the block ends."""
    content = json.dumps(body).encode()
    head = f"{method} {route} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + content)
        yield connection
