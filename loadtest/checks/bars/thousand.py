"""Bar 3: a thousand registered adapters, asked in Zipf order, with room for sixteen on the device; then a restart."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.checks.bars.answers import distance, hold_answers, hold_near, register_all
from manylora.loadtest.checks.bars.material import Material, prompts
from manylora.loadtest.checks.bars.quiet import MIB, report_books
from manylora.loadtest.checks.bars.reference import Reference, agrees
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask, Client
from manylora.loadtest.material.server_process import ServerProcess, running, start_server
from manylora.server.kernels.choose import PLAIN

RANK = 8
ON_DEVICE = 16
# About a third of a thousand fit on the host; the others are read from disk when they are asked.
# The KV cache is full after a fifth of the requests: until then its pages become resident one by one, which would hide
# what else grows.
FLAGS = ("--kv-cache-gib", "0.008", "--arena-rows", str(RANK * ON_DEVICE), "--host-cache-gib", "0.01")
ALONE_FLAGS = ("--kv-cache-gib", "0.05", "--arena-rows", "1024")
RESIDENT_SLACK = 16 << 20


@dataclass(frozen=True, slots=True)
class ThousandSize:
    """How much is registered and asked."""

    adapters: int = 1000
    requests: int = 3000
    streams: int = 32
    max_tokens: int = 8
    exponent: float = 1.0
    """Adapter k is asked in proportion to 1/k^exponent."""


SMALL = ThousandSize(adapters=100, requests=200, streams=16, max_tokens=4)


async def thousand(directory: Path, size: ThousandSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(f"3. {size.adapters} adapters on one base, {ON_DEVICE} at a time on the device")
    material = Material.make(directory, kernels)
    sources = {f"tenant/{i}": material.adapter(i, RANK) for i in range(1, size.adapters + 1)}
    asks = _zipf(list(sources), size)
    expected = await _expected(report, directory, material, sources, asks)
    flags = material.arguments(*FLAGS, quantization="none")
    server = start_server(material.base, directory / "server", flags)
    with running(server):
        async with Client(server.url) as client:
            await _register(report, client, sources)
            before, answers = await _serve(client, server, asks, size)
            _report_answers(report, material, asks, answers, [expected[ask] for ask in asks])
            _report_memory(report, server, before)
            await _report_moves(report, client)
            server.kill()
    began = time.monotonic()
    again = start_server(material.base, directory / "server", flags)
    with running(again):
        seconds = time.monotonic() - began
        async with Client(again.url) as client:
            right = [expected[ask] for ask in asks]
            await _report_restart(report, client, material, list(sources), asks, right)
    report.note(
        f"ready {seconds:.1f} s after a start with {size.adapters} adapters, the base's loading included"
    )
    return report


async def _expected(
    report: Report, directory: Path, material: Material, sources: dict[str, str], asks: Sequence[Ask]
) -> dict[Ask, Answer]:
    """Return what transformers + peft answer; or native kernels alone, once they are held against that."""
    reference = Reference(material.base, {name: material.adapters / src for name, src in sources.items()})
    asked = list(dict.fromkeys(asks))
    if not material.native:
        return {ask: reference.answer(ask) for ask in asked}
    server = start_server(
        material.base, directory / "alone", material.arguments(*ALONE_FLAGS, quantization="none")
    )
    with running(server):
        async with Client(server.url) as client:
            await register_all(client, {ask.model: sources[ask.model] for ask in asked})
            distances = [await distance(client, ask, reference.say(ask)) for ask in asked]
            hold_near(report, "", asked, distances)
            return {ask: await client.complete(ask) for ask in asked}


def _equality(material: Material) -> Callable[[Answer, Answer], bool]:
    return Answer.same_as if material.native else agrees


def _zipf(names: Sequence[str], size: ThousandSize) -> list[Ask]:
    rng = random.Random(8)
    weights = [rank**-size.exponent for rank in range(1, len(names) + 1)]
    each = dict(zip(names, prompts([rng.randint(1, 60) for _ in names], seed=9), strict=True))
    return [Ask(name, each[name], size.max_tokens) for name in rng.choices(names, weights, k=size.requests)]


async def _register(report: Report, client: Client, sources: dict[str, str]) -> None:
    began = time.monotonic()
    for name, source in sources.items():
        await client.register(name, source)
    seconds = time.monotonic() - began
    report.note(f"{len(sources) / seconds:.0f} registrations a second, one after the other")
    times = []
    for _ in range(5):
        began = time.monotonic()
        listed = await client.adapters()
        times.append(time.monotonic() - began)
    report.share("all are listed", len(listed), len(sources))
    report.note(f"GET /adapters takes {1000 * statistics.median(times):.0f} ms")


async def _serve(
    client: Client, server: ServerProcess, asks: Sequence[Ask], size: ThousandSize
) -> tuple[int, list[Answer]]:
    """Return the resident bytes after a fifth of the requests, and all answers."""
    gate = asyncio.Semaphore(size.streams)

    async def one(ask: Ask) -> Answer:
        async with gate:
            return await client.stream(ask)

    first = len(asks) // 5
    began = await asyncio.gather(*map(one, asks[:first]))
    resident = server.resident_bytes()
    return resident, began + await asyncio.gather(*map(one, asks[first:]))


def _report_answers(
    report: Report,
    material: Material,
    asks: Sequence[Ask],
    answers: Sequence[Answer],
    expected: Sequence[Answer],
) -> None:
    whose = "bit for bit that of the request alone" if material.native else "that of transformers + peft"
    promise = f"every answer is {whose} ({len(set(asks))} adapters asked)"
    hold_answers(report, promise, asks, expected, answers, _equality(material))


def _report_memory(report: Report, server: ServerProcess, before: int) -> None:
    growth = server.resident_bytes() - before
    report.check(
        f"resident memory is flat over the last four fifths of the requests, up to {RESIDENT_SLACK // MIB} MiB",
        f"{before / MIB:.0f} MiB, {growth / MIB:+.1f} MiB",
        growth <= RESIDENT_SLACK,
    )


async def _report_moves(report: Report, client: Client) -> None:
    metrics = await client.metrics()
    where = {"device": "on the device", "host": "on the host", "disk": "on disk only"}
    tiers = ", ".join(
        f"{metrics.total('manylora_adapters', _label('tier', tier)):.0f} {name}"
        for tier, name in where.items()
    )
    moves = [
        metrics.total("manylora_adapter_load_seconds_count", f'operation="{kind}"')
        for kind in ("place", "read")
    ]
    report.note(f"{moves[0]:.0f} copies to the device, {moves[1]:.0f} reads from disk; at the end {tiers}")
    await report_books(report, client)


def _label(name: str, value: str) -> str:
    return f'{name}="{value}"'


async def _report_restart(
    report: Report,
    client: Client,
    material: Material,
    names: Sequence[str],
    asks: Sequence[Ask],
    expected: Sequence[Answer],
) -> None:
    listed = {adapter["name"] for adapter in await client.adapters() if adapter["state"] == "available"}
    report.share("killed and started again: all are there", len(listed & set(names)), len(names))
    few = range(0, len(asks), max(1, len(asks) // 50))
    answers = await asyncio.gather(*(client.stream(asks[i]) for i in few))
    promise = "killed and started again: the answers are the same"
    asked, right = [asks[i] for i in few], [expected[i] for i in few]
    hold_answers(report, promise, asked, right, answers, _equality(material))
