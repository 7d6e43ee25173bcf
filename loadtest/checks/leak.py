"""Whether an hour of mixed load leaves anything behind: `python -m manylora.loadtest.checks.leak [--minutes 60]`.

A server of a small random base is asked by several clients for whole answers, streams, streams that are left, prompts
that share prefixes, models that aren't there and fields that are wrong, while adapters are registered, replaced and
deleted. Its resident memory, descriptors and threads, those of its processes included, are looked at all the time.
Its pools are small. After the first third of the run, in which caches fill, a straight line is laid through each
(least squares). What the line gains over the rest must stay under a bound: 16 MiB, 4 descriptors, 2 threads. That is
two thirds of an hour: 0.4 MiB a minute, at several thousand requests a minute. Then everything that requests and
adapters held must be given back. Exit status 1 if not.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression

import httpx
import psutil
from rich.console import Console

from manylora.loadtest.checks.bars.material import RANKS, TARGETS, Material, kernels_option, prompts
from manylora.loadtest.checks.bars.quiet import MIB, NOTHING, quiet, report_books
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.answer import HUNG_UP
from manylora.loadtest.material.manylora_client import Ask, Client
from manylora.loadtest.material.server_process import ServerProcess, running, start_server
from manylora.server.kernels.choose import AUTO, PLAIN

POOLS = ("--kv-cache-gib", "0.008", "--arena-rows", "512", "--host-cache-gib", "0.01")
"""So small that all of their memory has been touched soon: a pool that fills is no leak."""
CLIENTS = 6
WARM_UP = 1 / 3
"""Of the run: caches and pools fill, and nothing is judged."""
MOST_TOKENS = 40
KINDS = ("whole", "streamed", "left", "no such model", "bad field", "adapter comes and goes", "replaced")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the fitted line may gain after the warm-up."""

    mib: float = 16.0
    descriptors: float = 4.0
    threads: float = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What a server's processes hold at one moment."""

    seconds: float
    """Since the load began."""
    resident: int
    """Bytes."""
    descriptors: int
    threads: int


def gain(points: Sequence[tuple[float, float]]) -> float:
    """Return what a line through (time, value), by least squares, gains from the first time to the last."""
    if len({at for at, _ in points}) < 2:
        return 0.0
    times, values = zip(*points, strict=True)
    return float(linear_regression(times, values).slope * (times[-1] - times[0]))


def judge(report: Report, samples: Sequence[Sample], bounds: Bounds) -> None:
    """Hold the samples after the warm-up to the bounds."""
    ends = samples[-1].seconds if samples else 0.0
    late = [sample for sample in samples if sample.seconds >= WARM_UP * ends]
    over = f"over the last {ends * (1 - WARM_UP):.0f} s"
    for name, unit, most, values in (
        ("resident memory", "MiB", bounds.mib, [sample.resident / MIB for sample in late]),
        ("descriptors", "", bounds.descriptors, [float(sample.descriptors) for sample in late]),
        ("threads", "", bounds.threads, [float(sample.threads) for sample in late]),
    ):
        gained = gain([(sample.seconds, value) for sample, value in zip(late, values, strict=True)])
        shown = f"{gained:+.2f} {unit}".rstrip()
        levels = f"{values[0]:.0f} to {values[-1]:.0f}" if values else "nothing"
        report.check(
            f"{name}: a line through them gains at most {most:g} {unit}".rstrip() + f" {over}",
            f"{shown} ({levels}, {len(values)} samples)",
            len(values) >= 2 and gained <= most,
        )


def look(server: ServerProcess, began: float) -> Sample:
    """Add up the server's process and those that it started."""
    own = psutil.Process(server.process.pid)
    resident = descriptors = threads = 0
    for process in (own, *own.children(recursive=True)):
        try:
            with process.oneshot():
                resident += process.memory_info().rss
                descriptors += process.num_fds()
                threads += process.num_threads()
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile
    return Sample(time.monotonic() - began, resident, descriptors, threads)


class Load:
    """Clients that ask for everything until a moment, and count what they asked and what went wrong."""

    def __init__(
        self,
        client: Client,
        url: str,
        material: Material,
        names: Sequence[str],
        kinds: Sequence[str] = KINDS,
    ) -> None:
        self.kinds = kinds
        self.asked: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._client = client
        self._url = url
        self._material = material
        self._names = names

    async def run(self, number: int, until: float) -> None:
        """Be one client."""
        rng = random.Random(number)
        limits = httpx.Limits(keepalive_expiry=0)
        async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as http:
            while time.monotonic() < until:
                kind = rng.choice(self.kinds)
                try:
                    said = await self._ask(kind, number, rng, http)
                except httpx.TransportError as error:  # a finding, and the run goes on
                    said = repr(error)
                self.asked[kind] += 1
                if said:
                    self.wrong[f"{kind}: {said}"] += 1

    async def _ask(self, kind: str, number: int, rng: random.Random, http: httpx.AsyncClient) -> str | None:
        """Do one thing of a kind; return what is wrong with how it ended."""
        ask = self._request(rng, rng.choice(self._names))
        if kind == "whole":
            return (await self._client.complete(ask)).error
        if kind == "streamed":
            return (await self._client.stream(ask)).error
        if kind == "left":
            error = (await self._client.stream(ask, hang_up_after=rng.randrange(1, 8))).error
            return None if error in (HUNG_UP, None) else error
        if kind == "no such model":
            return _unless(404, (await self._client.stream(self._request(rng, "nobody"))).status)
        if kind == "bad field":
            body = {**ask.body(stream=False), "temperature": -1}
            return _unless(400, (await http.post("/v1/completions", json=body)).status_code)
        return await self._come_and_go(f"client{number}", rng, replace=kind == "replaced")

    async def _come_and_go(self, name: str, rng: random.Random, *, replace: bool) -> str | None:
        sources = [self._source(rng) for _ in range(1 + replace)]
        try:
            await self._client.register(name, sources[0], preload=rng.random() < 0.5)
            answers = [await self._client.stream(self._request(rng, name))]
            if replace:
                await self._client.replace(name, sources[1])
                answers.append(await self._client.complete(self._request(rng, name)))
            await self._client.delete(name)
        except httpx.HTTPStatusError as error:
            return str(error)
        return next((answer.error for answer in answers if answer.error), None)

    def _source(self, rng: random.Random) -> str:
        kind = rng.randrange(8)
        return self._material.adapter(kind, RANKS[kind % len(RANKS)], TARGETS[kind % len(TARGETS)])

    @staticmethod
    def _request(rng: random.Random, model: str) -> Ask:
        (prompt,) = prompts([rng.randrange(4, 200)], rng.randrange(40))  # some are asked again
        return Ask(model, prompt, rng.randrange(1, MOST_TOKENS))


def _unless(expected: int, status: int) -> str | None:
    return None if status == expected else f"status {status}, not {expected}"


async def leak(
    scratch: Path,
    seconds: float,
    every: float,
    bounds: Bounds,
    kinds: Sequence[str] = KINDS,
    kernels: str = PLAIN,
) -> tuple[Report, list[Sample]]:
    """Run the check; return what it found, and what was seen. Raises RuntimeError if the server doesn't start."""
    material = Material.make(scratch, kernels)
    sources = material.mixed(3)
    server = start_server(material.base, scratch / "server", material.arguments(*POOLS))
    report = Report(
        f"leak: {seconds / 60:.1f} minutes of mixed load by {CLIENTS} clients, kernels: {kernels}"
    )
    with running(server):
        # A process that isn't run for seconds, as one of low priority may be, must not send to what has been closed.
        async with Client(server.url, keep_alive=0) as client:
            names = [f"stays{number}" for number in range(len(sources))]
            for name, source in zip(names, sources, strict=True):
                await client.register(name, source)
            load = Load(client, server.url, material, [material.base.name, *names], kinds)
            samples = await _under_load(server, load, seconds, every)
            judge(report, samples, bounds)
            failed = sum(load.wrong.values())
            examples = [f"{count} × {what}" for what, count in load.wrong.most_common(3)]
            total = sum(load.asked.values())
            report.share("every request ends as it should", total - failed, total, examples)
            missing = [kind for kind in kinds if not load.asked[kind]]
            report.check("every kind was asked", ", ".join(missing) or "all", not missing)
            for name in names:
                await client.delete(name)
            held = await quiet(client)
            report.check("afterwards nothing is held", str(held), held == NOTHING)
            await report_books(report, client)
            report.note(", ".join(f"{count} × {kind}" for kind, count in load.asked.most_common()))
    return report, samples


async def _under_load(server: ServerProcess, load: Load, seconds: float, every: float) -> list[Sample]:
    began = time.monotonic()
    samples: list[Sample] = []
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(load.run(number, began + seconds))
        while time.monotonic() < began + seconds:
            samples.append(look(server, began))
            await asyncio.sleep(every)
    return samples


def main() -> None:
    """Run it, and say by the exit status whether something leaks."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.checks.leak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--mib", type=float, default=Bounds().mib, help="that memory may gain")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="to find out what it is")
    parser.add_argument("--kernels", type=kernels_option, default=AUTO, help="plain, auto, or a native level")
    parser.add_argument("--json", type=Path, help="write what was seen, moment by moment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="manylora-leak-") as scratch:
        bounds = Bounds(options.mib)
        seconds = 60 * options.minutes
        run = leak(Path(scratch), seconds, options.every, bounds, options.only, options.kernels)
        report, seen = asyncio.run(run)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(sample) for sample in seen]) + "\n")
    report.print(Console())
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
