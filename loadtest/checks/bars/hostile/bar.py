"""Bar 6: thousands of hostile requests beside eight well-behaved streams, which notice nothing."""

import asyncio
import contextlib
import gc
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil

from manylora.loadtest.checks.bars.hostile import verdict
from manylora.loadtest.checks.bars.hostile.exchange import call, perform
from manylora.loadtest.checks.bars.hostile.material import BASE, GOOD, HostileMaterial, lanes
from manylora.loadtest.checks.bars.hostile.streams import Watch, address, ask, watch
from manylora.loadtest.checks.bars.hostile.verdict import Done, Limits, Usage
from manylora.loadtest.checks.bars.quiet import NOTHING, quiet, report_books
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.manylora_client import Client
from manylora.loadtest.material.server_process import (
    START_SECONDS,
    ServerProcess,
    environment_of_children,
    running,
    start_server,
)
from manylora.server.kernels.choose import PLAIN

SETTLE_SECONDS = 20.0
"""The server may take so long to give back what the last request had."""
SAMPLE_SECONDS = 0.5
CACHE_FILLS, FILL_TOKENS = 28, 1000
"""Prompts that together fill the cache of material.py, which holds some 26,000 tokens."""


@dataclass(frozen=True, slots=True)
class HostileSize:
    """How much is done."""

    requests: int = 10_000
    seed: int = 1
    clients: int = 16
    """Hostile clients at a time."""
    kinds: tuple[str, ...] = ()
    """Only these; empty: all."""
    limits: Limits = field(default_factory=Limits)


# Times are not judged where other tests share the cores.
SMALL = HostileSize(requests=200, limits=Limits(gap_medians=float("inf"), health_seconds=30.0))


async def hostile(directory: Path, size: HostileSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(f"6. {size.requests:,} hostile requests (seed {size.seed}) beside 8 well-behaved streams")
    material = HostileMaterial.make(directory)
    server = start_server(material.base, directory / "server", material.arguments(kernels))
    with running(server):
        async with Client(server.url) as client:
            for name in GOOD:
                await client.register(name, name)
            await _fill_cache(server)
            alone = await _alone(server)
            before = _usage(server)
            seen, peak, outcomes = await _beside(server, material, size, directory / "outcomes.jsonl")
            verdict.report_streams(report, alone, seen, size.limits)
            verdict.report_health(report, seen, size.limits)
            verdict.report_outcomes(report, outcomes)
            await _report_rest(report, server, client, before, peak, size.limits)
            verdict.note_kinds(report, seen, outcomes)
    return report


async def _fill_cache(server: ServerProcess) -> None:
    """Use every block of the KV cache once: its pages count as the server's memory from then on."""
    for number in range(CACHE_FILLS):
        prompt = [3 + number, *[7] * (FILL_TOKENS - 1)]
        body = {"model": BASE, "prompt": prompt, "max_tokens": 1}
        done = await perform(call("POST", "/v1/completions", body), *address(server.url), START_SECONDS)
        if done.status != 200:
            raise RuntimeError(f"the server doesn't answer: {done}")


async def _alone(server: ServerProcess) -> Mapping[tuple[str, int], list[tuple[str, float]]]:
    """Return the tokens of each lane's questions, asked one at a time."""
    return {
        (lane.name, number): (await ask(server.url, body)).tokens()
        for lane in lanes()
        for number, body in enumerate(lane.bodies)
    }


async def _beside(
    server: ServerProcess, material: HostileMaterial, size: HostileSize, out: Path
) -> tuple[Watch, int, list[Done]]:
    """Stream and watch while the hostile clients work; return what was seen, the peak memory, how they fared."""
    over = asyncio.Event()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        async with _sampling(server) as memory:
            watching = asyncio.create_task(watch(server.url, lanes(), over))
            try:
                await _attack(server, material, size, out)
            finally:
                over.set()
            seen = await watching
    finally:
        gc.enable()
        gc.unfreeze()
    return seen, max(memory), _read(out)


def _read(out: Path) -> list[Done]:
    return [Done(**json.loads(line)) for line in out.read_text().splitlines()]


async def _attack(server: ServerProcess, material: HostileMaterial, size: HostileSize, out: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "manylora.loadtest.checks.bars.hostile.attack"),
        *(server.url, str(material.adapters), str(out), "--models", BASE, *GOOD),
        *("--requests", str(size.requests), "--seed", str(size.seed), "--clients", str(size.clients)),
        *("--kinds", *size.kinds),
        env=environment_of_children(),
    )
    try:
        if await process.wait():
            raise RuntimeError("the hostile clients failed")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


@contextlib.asynccontextmanager
async def _sampling(server: ServerProcess) -> AsyncIterator[list[int]]:
    """Note the server's resident memory until the block ends."""
    memory = [_usage(server).resident]

    async def sample() -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            memory.append(_usage(server).resident)

    task = asyncio.create_task(sample())
    try:
        yield memory
    finally:
        task.cancel()


def _usage(server: ServerProcess) -> Usage:
    """Return what the server and its children hold of the machine."""
    main = psutil.Process(server.process.pid)
    resident, children = main.memory_info().rss, main.children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error):
            resident += child.memory_info().rss
    return Usage(resident, main.num_fds(), main.num_threads(), len(children))


async def _report_rest(
    report: Report, server: ServerProcess, client: Client, before: Usage, peak: int, limits: Limits
) -> None:
    """Look at what is still held once everybody has left."""
    deadline = time.monotonic() + SETTLE_SECONDS
    after = _usage(server)
    while not limits.came_back(before, after) and time.monotonic() < deadline:
        await asyncio.sleep(SAMPLE_SECONDS)
        after = _usage(server)
    verdict.report_usage(report, before, after, peak, limits)
    names = sorted(record["name"] for record in await client.adapters())
    report.check("of the adapters only the well-behaved are left", ", ".join(names), names == sorted(GOOD))
    for name in names:
        with contextlib.suppress(httpx.HTTPStatusError):  # what can't be deleted is still held
            await client.delete(quote(name))
    left = await quiet(client)
    report.check("then nothing is held at all", str(left), left == NOTHING)
    files = server.stored_files()
    report.check("and no file stays", str(files), files == 0)
    await report_books(report, client)
