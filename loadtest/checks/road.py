"""What a step costs that is no kernel, how much of the engine's speed comes out of HTTP, and what a long prompt does to
streams. Exits 1 if a bar is missed.

The engine is measured alone and behind `manylora serve` with the client on the same cores, with as many streams, by
turns; of each the round counts that was disturbed least. Through HTTP the server's metrics say what layers, head and
sampling took, measured where they ran: all else of the time from step to step is Python, waiting for the interpreter or
for a core. Run it on a machine that does nothing else: ``python -m manylora.loadtest.checks.road``.
"""

import argparse
import asyncio
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import torch

from manylora.loadtest.bench.engine import EngineBench, run_engine
from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.workload import Workload
from manylora.loadtest.checks.road_streams import Streams
from manylora.loadtest.material.checkpoints import ALL_LINEAR, SHAPES, AdapterShape, write_adapter, write_base
from manylora.loadtest.material.random_model import ModelChoice
from manylora.loadtest.material.server_process import running, start_server
from manylora.loadtest.material.text_table import text_table

MOST_OTHER = 0.001
"""Seconds of a step of MANY streams that are no kernel."""
MANY = 32
LEAST_SHARE = 0.95
"""Of the engine's own tokens a second that come out of HTTP."""
MOST_GAP = 2.0
"""Of the median gap: the longest while a long prompt comes in."""
BESIDE = 8
"""Streams that run while it does."""
PROMPT = 64
TOO_SHORT = "the streams didn't run at the same time: ask for longer answers with --output"
LONGEST = 600.0
RANK = 16


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured."""

    shape: str = "qwen2.5-0.5b"
    quantization: str = "nf4"
    streams: tuple[int, ...] = (1, 8, 32)
    adapters: int = 8
    output: int = 128
    long_prompt: int = 4096
    rounds: int = 2


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps in which so many streams got a token each, and nothing else was computed."""

    streams: int
    seconds: float
    """From one to the next."""
    kernels: float
    """Of these: layers, head and sampling."""

    @property
    def other(self) -> float:
        """Seconds of a step that are no kernel."""
        return self.seconds - self.kernels

    @property
    def tokens_per_second(self) -> float:
        """What all streams get."""
        return self.streams / self.seconds


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between a stream's tokens, the streams' tokens taken together."""

    median: float
    """Before the prompt came."""
    usual: float
    """The longest before it came: what the machine does to streams by itself."""
    longest: float
    """From then until its first token."""
    seconds: float
    """That took."""

    @property
    def ratio(self) -> float:
        """How many times the median the longest is."""
        return self.longest / self.median


@dataclass(frozen=True, slots=True)
class Road:
    """What was found."""

    alone: tuple[Steps, ...]
    served: tuple[Steps, ...]
    gaps: Gaps

    def misses(self) -> list[str]:
        """Return the bars that don't hold."""
        missed = [
            f"{1000 * served.other:.2f} ms of a step of {served.streams} streams are no kernel"
            for served in self.served
            if served.streams == MANY and served.other > MOST_OTHER
        ]
        for alone, served in zip(self.alone, self.served, strict=True):
            share = served.tokens_per_second / alone.tokens_per_second
            if share < LEAST_SHARE:
                missed.append(
                    f"{share:.1%} of the engine's tokens come out of HTTP at {alone.streams} streams"
                )
        if self.gaps.ratio > MOST_GAP:
            missed.append(f"a stream waited {self.gaps.ratio:.2f} medians while the prompt came in")
        return missed

    def table(self) -> str:
        """Return the figures as text."""
        head = ["streams", "step, engine alone", "no kernel", "step, HTTP", "no kernel", "HTTP's share"]
        rows = [
            [
                str(alone.streams),
                *(
                    f"{1000 * each:.2f} ms"
                    for each in (alone.seconds, alone.other, served.seconds, served.other)
                ),
                f"{served.tokens_per_second / alone.tokens_per_second:.1%}",
            ]
            for alone, served in zip(self.alone, self.served, strict=True)
        ]
        gaps = self.gaps
        beside = (
            f"a long prompt beside {BESIDE} streams, {gaps.seconds:.1f} s to its first token: median gap "
            f"{1000 * gaps.median:.1f} ms, longest {1000 * gaps.longest:.1f} ms, {gaps.ratio:.2f} medians "
            f"({gaps.usual / gaps.median:.2f} before it came)"
        )
        return f"{text_table(head, rows)}\n\n{beside}"


def engine_alone(size: Size, streams: int) -> Steps:
    """Measure the engine without HTTP."""
    work = Workload(streams, Popularity.parse("uniform"), PROMPT, size.output, streams, 0, 0)
    choice = ModelChoice(size.shape, "nf4" if size.quantization == "nf4" else "none")
    result = run_engine(EngineBench(choice, work, size.adapters, RANK, temperature=0.8, top_p=0.9))
    found = result.decode
    if not found.steps:
        raise RuntimeError(TOO_SHORT)
    return Steps(streams, found.total.mean, found.model + found.sample)


@dataclass(frozen=True, slots=True)
class _Reading:
    seconds: float
    steps: float
    kernels: float


async def _read_metrics(client: httpx.AsyncClient) -> _Reading:
    began = asyncio.get_running_loop().time()
    text = (await client.get("/metrics")).text

    def value(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"/metrics has no {name}"
        return float(found[1])

    kernels = sum(value(f'manylora_step_part_seconds_total{{part="{part}"}}') for part in ("model", "sample"))
    return _Reading(began, value("manylora_step_seconds_count"), kernels)


async def through_http(url: str, size: Size, streams: int) -> Steps:
    """Measure from when all streams run until the first of them ends."""
    run = Streams(url)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        try:
            for number in range(streams):
                prompt = [100 + (7 * number + i) % 200 for i in range(PROMPT)]
                await run.ask(f"adapter{number % size.adapters}", prompt, size.output)
            await run.until(lambda: all(len(each.times) >= 2 for each in run.streams), LONGEST)
            first = await _read_metrics(client)
            enough = 3 * size.output // 4
            await run.until(lambda: any(s.ended or len(s.times) >= enough for s in run.streams), LONGEST)
            last = await _read_metrics(client)
        finally:
            run.close()
    steps = last.steps - first.steps
    if steps < 1:
        raise RuntimeError(TOO_SHORT)
    return Steps(streams, (last.seconds - first.seconds) / steps, (last.kernels - first.kernels) / steps)


async def beside_a_prompt(url: str, size: Size) -> Gaps:
    """Let a long prompt come in beside streams."""
    run = Streams(url)
    try:
        for number in range(BESIDE):
            prompt = [100 + (11 * number + i) % 200 for i in range(PROMPT)]
            await run.ask(f"adapter{number % size.adapters}", prompt, 16 * size.output, logprobs=0)
        others = list(run.streams)
        await run.until(lambda: all(len(each.times) > size.output // 2 for each in others), LONGEST)
        asked = max(each.times[-1] for each in others)
        prompt = [100 + i * i % 211 for i in range(size.long_prompt)]
        late = await run.ask("adapter0", prompt, 1, logprobs=0)
        await run.until(lambda: bool(late.times), LONGEST)
        come = late.times[0]
        await run.until(lambda: all(each.times[-1] > come or each.ended for each in others), LONGEST)
    finally:
        run.close()
    return gaps_of([each.times for each in others], asked, come)


def gaps_of(streams: Sequence[Sequence[float]], asked: float, come: float) -> Gaps:
    """Return the gaps of streams with tokens at these times; a prompt was on its way from ``asked`` to ``come``."""
    before: list[float] = []
    during: list[float] = []
    for times in streams:
        for early, late in pairwise(times):
            if late <= asked:
                before.append(late - early)
            elif early <= come:
                during.append(late - early)
    return Gaps(statistics.median(before), max(before), max(during), come - asked)


@contextmanager
def serving(size: Size, scratch: Path) -> Iterator[str]:
    """Serve a random checkpoint of the shape with its adapters; yield the URL."""
    base = write_base(scratch / "base", SHAPES[size.shape], dtype=torch.bfloat16)
    arguments = ["--quantization", size.quantization, "--dtype", "bfloat16", "--adapter-root", str(scratch)]
    arguments += ["--kv-cache-gib", "0.5", "--arena-rows", str(size.adapters * RANK)]
    for number in range(size.adapters):
        shape = AdapterShape(RANK, 2.0 * RANK, ALL_LINEAR, number)
        path = write_adapter(scratch / f"adapter{number}", base, shape, dtype=torch.bfloat16)
        arguments += ["--adapter", f"adapter{number}={path}"]
    server = start_server(base, scratch / "serve", arguments)
    with running(server, start_seconds=LONGEST):
        yield server.url


def measure(size: Size, scratch: Path) -> Road:
    """Measure everything."""
    alone: list[list[Steps]] = []
    served: list[list[Steps]] = []
    with serving(size, scratch) as url:
        asyncio.run(through_http(url, size, BESIDE))  # warms up
        for _ in range(size.rounds):
            served.append([asyncio.run(through_http(url, size, streams)) for streams in size.streams])
            alone.append([engine_alone(size, streams) for streams in size.streams])
        gaps = asyncio.run(beside_a_prompt(url, size))
    return Road(least_disturbed(alone), least_disturbed(served), gaps)


def least_disturbed(rounds: Sequence[Sequence[Steps]]) -> tuple[Steps, ...]:
    """Return of each number of streams the round whose steps were the shortest."""
    return tuple(min(each, key=lambda steps: steps.seconds) for each in zip(*rounds, strict=True))


def main() -> int:
    """Print what was found."""
    usual = Size()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default=usual.shape)
    parser.add_argument("--quantization", choices=("nf4", "none"), default=usual.quantization)
    parser.add_argument("--streams", type=int, nargs="+", default=list(usual.streams))
    parser.add_argument("--output", type=int, default=usual.output, help="tokens of each answer")
    parser.add_argument("--prompt", type=int, default=usual.long_prompt, help="tokens of the long prompt")
    parser.add_argument(
        "--rounds", type=int, default=usual.rounds, help="of the engine alone and through HTTP"
    )
    options = parser.parse_args()
    size = Size(
        options.shape,
        options.quantization,
        tuple(options.streams),
        usual.adapters,
        options.output,
        options.prompt,
        options.rounds,
    )
    with tempfile.TemporaryDirectory(prefix="manylora-road-") as scratch:
        road = measure(size, Path(scratch))
    missed = road.misses()
    print(road.table(), "", *(f"MISSED: {each}" for each in missed), sep="\n")  # noqa: T201  # the result
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
