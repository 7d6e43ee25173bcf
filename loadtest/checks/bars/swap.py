"""Bar 2: adapters are registered, replaced and deleted while streams run, and no stream notices."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from manylora.loadtest.checks.bars.material import RANKS, TARGETS, Material, prompts
from manylora.loadtest.checks.bars.quiet import MIB, NOTHING, quiet, report_books
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.checks.bars.timeline import ABSENT, Timeline
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask, Client, Held
from manylora.loadtest.material.server_process import ServerProcess, running, start_server
from manylora.server.kernels.choose import PLAIN

NAMES = tuple(f"name{number}" for number in range(10))
VERSIONS = 24
PROMPT_LENGTHS = (3, 20, 45, 90)
FLAGS = ("--kv-cache-gib", "0.2", "--arena-rows", "1024")
RESIDENT_SLACK = 24 << 20
"""What an allocator may keep after a storm; one leaked version out of 600 would be within it, all of them not."""

Truth = Mapping[tuple[str, tuple[int, ...]], Answer]
"""The answer of each version (by source) to each prompt."""


@dataclass(frozen=True, slots=True)
class SwapSize:
    """How much is done."""

    streams: int = 64
    cycles: int = 200
    max_tokens: int = 24
    pause: float = 0.2
    """Seconds, at most, that a name stays as it is before its next change."""


SMALL = SwapSize(streams=16, cycles=20, max_tokens=8, pause=0.1)


@dataclass(slots=True)
class _Storm:
    """What happens under fire."""

    client: Client
    size: SwapSize
    versions: Sequence[str]
    truth: Truth
    timelines: dict[str, Timeline] = field(default_factory=lambda: {name: Timeline() for name in NAMES})
    cycles: "itertools.count[int]" = field(default_factory=itertools.count)
    over: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    async def stream(self, seed: int) -> None:
        """Ask one name after the other until the storm is over."""
        rng = random.Random(seed)
        asked = sorted({prompt for _, prompt in self.truth})
        while not self.over:
            there = [name for name, line in self.timelines.items() if line.version is not ABSENT]
            names = there if there and rng.random() < 0.9 else NAMES
            ask = Ask(rng.choice(names), rng.choice(asked), self.size.max_tokens)
            began = time.monotonic()
            answer = await self.client.stream(ask)
            self._judge(ask, answer, began)

    def _judge(self, ask: Ask, answer: Answer, began: float) -> None:
        could = self.timelines[ask.model].possible(began, time.monotonic())
        if answer.status == 404 and ABSENT in could:
            self.outcomes["404"] += 1
            return
        if not answer.complete:
            self.outcomes["failed"] += 1
            self.failures.append(f"{ask.model}: {answer.error} {answer.error_message}")
            return
        given = [v for v in could if v is not ABSENT and answer.same_as(self.truth[v, ask.prompt])]
        self.outcomes["right" if len(given) == 1 else "mixed up"] += 1
        if len(given) != 1:
            self.wrong.append(f"{ask.model}: the text is that of {len(given)} of {len(could)} versions")

    async def churn(self, name: str, seed: int) -> None:
        """Take a name through cycles of register, replace, delete, until all names have done enough."""
        rng = random.Random(seed)
        while next(self.cycles) < self.size.cycles:
            first, second = rng.sample(self.versions, 2)
            with self.timelines[name].change(first):
                await self.client.register(name, first, preload=rng.random() < 0.5)
            await asyncio.sleep(rng.uniform(0, self.size.pause))  # let some streams find this version
            with self.timelines[name].change(second):
                await self.client.replace(name, second)
            await asyncio.sleep(rng.uniform(0, self.size.pause))
            with self.timelines[name].change(ABSENT):
                await self.client.delete(name)

    async def rage(self) -> float:
        """Run until all cycles are done; return the seconds."""
        began = time.monotonic()
        streams = [asyncio.create_task(self.stream(seed)) for seed in range(self.size.streams)]
        await asyncio.gather(*(self.churn(name, seed=1000 + i) for i, name in enumerate(NAMES)))
        self.over = True
        await asyncio.gather(*streams)
        return time.monotonic() - began


async def swap(directory: Path, size: SwapSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(
        f"2. Swap under fire: {size.streams} streams, {size.cycles} cycles over {len(NAMES)} names"
    )
    material = Material.make(directory, kernels)
    versions = [
        material.adapter(i, RANKS[i % len(RANKS)], TARGETS[i % len(TARGETS)]) for i in range(VERSIONS)
    ]
    server = start_server(material.base, directory / "server", material.arguments(*FLAGS))
    with running(server):
        async with Client(server.url) as client:
            truth = await _truth(client, versions, size.max_tokens)
            distinct = len({(answer.text, *answer.logprobs) for answer in truth.values()})
            report.share("each version's answer to each prompt is its own", distinct, len(truth))
            # The allocator's and the server's own growth under load belongs to no version.
            await _Storm(client, replace(size, cycles=len(NAMES)), versions, truth).rage()
            before = await quiet(client)
            resident = server.resident_bytes()
            storm = _Storm(client, size, versions, truth)
            seconds = await storm.rage()
            _report_streams(report, storm, seconds)
            await _report_memory(report, client, server, before, resident)
    return report


async def _truth(client: Client, versions: Sequence[str], max_tokens: int) -> Truth:
    """Ask each version alone."""
    truth = {}
    for number, version in enumerate(versions):
        await client.register(f"alone{number}", version)
        for prompt in prompts(PROMPT_LENGTHS, seed=5):
            truth[version, prompt] = await client.complete(Ask(f"alone{number}", prompt, max_tokens))
        await client.delete(f"alone{number}")
    return truth


def _report_streams(report: Report, storm: _Storm, seconds: float) -> None:
    outcomes = storm.outcomes
    total = sum(outcomes.values())
    report.check(
        "no request fails but those that name a deleted adapter (404)",
        "; ".join(
            [
                f"{total} requests, {outcomes['404']} of them 404, {outcomes['failed']} failed",
                *storm.failures[:3],
            ]
        ),
        outcomes["failed"] == 0 and total > 0,
    )
    answered = outcomes["right"] + outcomes["mixed up"]
    report.share(
        "every stream's text is that of exactly one version, in force then",
        outcomes["right"],
        answered,
        storm.wrong,
    )
    report.note(
        f"{3 * storm.size.cycles / seconds:.0f} changes and {answered / seconds:.0f} answers a second"
    )


async def _report_memory(
    report: Report, client: Client, server: ServerProcess, before: Held, resident: int
) -> None:
    after = await quiet(client)
    report.check("nothing is held before", str(before), before == NOTHING)
    report.check(
        "nothing is held afterwards: sequences, blocks, rows, adapters, host bytes",
        str(after),
        after == NOTHING,
    )
    report.check("no file is left in the store", str(server.stored_files()), server.stored_files() == 0)
    growth = server.resident_bytes() - resident
    report.check(
        f"resident memory is where it was, up to {RESIDENT_SLACK // MIB} MiB",
        f"{resident / MIB:.0f} MiB, {growth / MIB:+.1f} MiB",
        growth <= RESIDENT_SLACK,
    )
    await report_books(report, client)
