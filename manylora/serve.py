"""`manylora serve`: loads, says what it loaded, serves, drains at the first Ctrl-C and stops at the second."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from manylora.adapters.errors import AdapterError
from manylora.adapters.mixtures import parse_mixture, spell
from manylora.assemble import Server, assemble, start_adapters
from manylora.banner import banner, warnings_at_start
from manylora.base import DEMO, find_base
from manylora.descriptors import connection_limits, raise_descriptor_limit
from manylora.listening import bind, url_of, why
from manylora.loading import told
from manylora.logs import Voice, configure_logs
from manylora.quant.errors import QuantError
from manylora.quant.native_caches import keep_few_kernels
from manylora.server.api.connections import http_config
from manylora.server.catalog import AdapterCatalog
from manylora.server.catalog.watch import Watch
from manylora.server.config import ServeSettings
from manylora.server.engine.async_engine import AsyncEngine
from manylora.server.errors import ServerError
from manylora.server.kernels.choose import leave_cores_to
from manylora.server.memory import give_back
from manylora.server.model.errors import ModelError
from manylora.server.model.weight_cache import WeightCache
from manylora.server.threads import engine_first, step_back

DEMO_NAME = "demo"
KERNELS = 128
"""Compiled kernels that are kept: a step needs about ten, and others for each number of rows."""


class StartError(Exception):
    """The server can't start. One line: why, and what to do."""


def serve(settings: ServeSettings) -> None:
    """Run a server until it is told to stop. Raises StartError."""
    configure_logs(settings)
    keep_few_kernels(KERNELS)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings))
    except (ModelError, QuantError, AdapterError, ServerError, ValueError) as error:
        raise StartError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartError(f"{where}{error.strerror or error}") from error


async def _serve(settings: ServeSettings) -> None:
    engine_first()
    sockets = bind(settings)
    try:
        directory, name = find_named_base(settings)
        await _load_and_run(settings, directory, name, sockets)
    finally:
        for each in sockets:
            each.close()


async def _load_and_run(
    settings: ServeSettings, directory: Path, name: str, sockets: list[socket.socket]
) -> None:
    voice = Voice(settings)
    # The loop has nothing else to do yet.
    with told(name, voice) as hear, _ending_at_ctrl_c():
        server = assemble(settings, directory, name, hear)
    leave_cores_to(server.base.decoder.backend)
    give_back()  # reading a tokenizer takes several times what it is
    server.engine.start()
    try:
        await _restore(server, settings, voice)
        async with _watching(server, settings, voice):
            await _run(server, settings, name, sockets, voice)
    finally:
        await server.engine.stop()
        await server.catalog.close()


@asynccontextmanager
async def _watching(server: Server, settings: ServeSettings, voice: Voice) -> AsyncIterator[None]:
    """Follow the directory of --watch, if one is given, until the block ends. Raises StartError if there is none."""
    if settings.watch is None:
        yield
        return
    if not settings.watch.is_dir():
        raise StartError(f"{settings.name_of('watch')} {settings.watch}: there is no such directory")
    watch = Watch(
        server.catalog,
        settings.watch,
        lambda name, error: voice.warn(f"{settings.name_of('watch')}: {name}: {error}", adapter=name),
        keep_removed=settings.watch_removed == "keep",
    )
    watching = asyncio.create_task(watch.run(settings.watch_seconds))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait((watching,))


@contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """Let the first Ctrl-C end the loading: the event loop's own handler would wait until it is done."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def find_named_base(settings: ServeSettings) -> tuple[Path, str]:
    """Return the base's directory and the name that it is served under. Raises ModelMissing, StartError."""
    if settings.base is None:
        return find_base(str(DEMO / "base")), settings.served_model_name or DEMO_NAME
    directory = find_base(settings.base)
    # What was typed may be "." or end in "..", but a link keeps the name that it was given.
    is_directory = Path(os.path.expanduser(settings.base)).is_dir()
    own = Path(os.path.abspath(directory)).name if is_directory else settings.base
    name = settings.served_model_name or own
    if not name:
        raise StartError(f"{settings.base} has no name to serve it under: give one with --served-model-name")
    return directory, name


async def _restore(server: Server, settings: ServeSettings, voice: Voice) -> None:
    report = await server.catalog.restore()
    for name, reason in report.unavailable.items():
        voice.warn(f"adapter {name} is unavailable: {reason}", adapter=name)
    for argument in start_adapters(settings):
        # What the directory holds now is what was asked for, whatever the data directory knows by that name.
        try:
            outcome = await server.catalog.put(argument.adapter_name, str(argument.path))
        except (AdapterError, ServerError) as error:
            raise StartError(f"--adapter {argument.adapter_name}={argument.path}: {error}") from error
        if outcome.replaced is not None:
            old, new = outcome.replaced, outcome.record
            voice.warn(
                f"adapter {new.name} is {new.source} from now on (version {new.version});"
                f" in --data-dir it was {old.source} (version {old.version})"
            )
    await _start_mixtures(server.catalog, settings, voice)


async def _start_mixtures(catalog: AdapterCatalog, settings: ServeSettings, voice: Voice) -> None:
    """Serve the mixtures of the flags once the adapters are there, and tell which of all can't be served."""
    for argument in settings.mixtures:
        name = argument.mixture_name
        old = catalog.get_mixture(name)
        try:
            parts = parse_mixture(argument.spelled, lambda part: catalog.kind_of(part) is not None)
            new, is_new = await catalog.put_mixture(name, parts)
        except (AdapterError, ServerError) as error:
            raise StartError(f"{settings.name_of('mixture')} {argument}: {error}") from error
        if old is not None and is_new:
            voice.warn(
                f"mixture {name} is {spell(new.record.parts)} from now on (version {new.record.version});"
                f" in --data-dir it was {spell(old.record.parts)} (version {old.record.version})"
            )
    for entry in catalog.mixtures():
        if entry.reason is not None:
            voice.warn(
                f"mixture {entry.record.name} is unavailable: {entry.reason}", adapter=entry.record.name
            )


async def _run(
    server: Server, settings: ServeSettings, name: str, sockets: list[socket.socket], voice: Voice
) -> None:
    config = http_config(
        server.app,
        connection_limits(settings, raise_descriptor_limit()),
        drain_seconds=settings.drain_timeout,
    )

    def started() -> None:
        url = url_of(settings, sockets)
        voice.show("manylora", banner(server, settings, name, url), f"listening on {url}")
        for sentence in warnings_at_start(server, settings):
            voice.warn(sentence)
        _keep_weights(server.base.cache)

    running = DrainingServer(config, server.engine, settings.drain_timeout, started, voice)
    try:
        await running.serve(sockets)
    except OSError as error:
        if running.started:
            raise
        # Another server was starting too, and listens first.
        raise StartError(why(settings, error)) from None


def _keep_weights(cache: WeightCache | None) -> None:
    """Write prepared weights down for the next start, behind everything else. An end of the server cuts that short."""

    def write(cache: WeightCache) -> None:
        step_back()
        cache.write()

    if cache is not None:
        threading.Thread(target=write, args=(cache,), name="weight-cache", daemon=True).start()


class DrainingServer(uvicorn.Server):
    """uvicorn, which on the first signal lets the engine finish what it has and on the second stops at once.

    While it drains it goes on listening: /ready and new requests get their 503, not a refused connection.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: AsyncEngine,
        drain_timeout: float,
        started: Callable[[], None],
        voice: Voice,
    ) -> None:
        super().__init__(config)
        self._voice = voice
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._announce = started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._announce()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on SIGHUP too: a terminal that closes ends no stream. Where it is ignored (nohup) it stays so."""
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
            with super().capture_signals():
                yield
            return
        before = signal.signal(hangup, self.handle_exit)
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(hangup, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal stops at once."""
        self._signals += 1
        if self._signals > 1 or self._loop is None:
            self._voice.say("stopping now")
            # Threads may be in the middle of a step; nothing is worth waiting for.
            os._exit(128 + sig)
        stats = self._engine.snapshot()
        under_way = f"{stats.running} running and {stats.waiting} waiting sequences"
        self._voice.say(
            f"draining {under_way}, {self._drain_timeout:g} s at most; Ctrl-C again stops at once",
            running=stats.running,
            waiting=stats.waiting,
        )
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._engine.drain(self._drain_timeout)
        self.should_exit = True


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
