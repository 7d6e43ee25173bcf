"""What running streams lose to an export: `python -m manylora.loadtest.checks.export_streams [--pairs 16]`.

A server with a random base of some 100 M weights streams to four clients while it merges an adapter again and again.
The job, a process of its own, is stopped and continued in turn (SIGSTOP, SIGCONT); tokens are counted in windows with
it and without it, side by side in time, so that nothing else on the machine counts for one side alone. The bar: 20 %.
"""

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil

from manylora.loadtest.material.checkpoints import AdapterShape, BaseShape, write_adapter, write_base
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.server_process import ServerProcess, start_server

SHAPE = BaseShape("qwen2", 32000, 768, 2048, 12, 12, 4, 2048)
STREAMS = 4
NAME = "merged"
WINDOW = 1.0
"""Seconds."""
WARM_UP = 5.0
BAR = 0.20


class Counter:
    """Tokens that arrived."""

    def __init__(self) -> None:
        self.tokens = 0

    async def rate(self) -> float:
        """Return tokens a second over the next window."""
        before = self.tokens
        await asyncio.sleep(WINDOW)
        return (self.tokens - before) / WINDOW


async def stream(client: httpx.AsyncClient, url: str, number: int, counter: Counter) -> None:
    """Ask for long answers, one after the other, for ever."""
    body = {
        "model": NAME,
        "prompt": f"stream {number}",
        "max_tokens": 1000,
        "ignore_eos": True,
        "stream": True,
    }
    while True:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                counter.tokens += line.startswith("data: {")


@asynccontextmanager
async def streams(client: httpx.AsyncClient, url: str) -> AsyncIterator[Counter]:
    """Keep the streams running while the block does."""
    counter = Counter()
    tasks = [asyncio.create_task(stream(client, url, number, counter)) for number in range(STREAMS)]
    try:
        await asyncio.sleep(WARM_UP)
        yield counter
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def job_process(client: httpx.AsyncClient, server: ServerProcess) -> psutil.Process:
    """Return the running job's process; start a job if there is none."""
    while True:
        for child in psutil.Process(server.process.pid).children():
            if (
                "manylora.adapters.export" in " ".join(child.cmdline())
                and child.status() != psutil.STATUS_ZOMBIE
            ):
                return child
        response = await client.post(f"{server.url}/adapters/{NAME}/export", json={"format": "merged"})
        response.raise_for_status()
        await asyncio.sleep(3.0)  # Python's start-up is no merging


async def measure(server: ServerProcess, pairs: int) -> list[float]:
    """Return, for each pair of windows, the share of tokens that the job cost."""
    losses: list[float] = []
    async with httpx.AsyncClient(timeout=None) as client, streams(client, server.url) as counter:
        while len(losses) < pairs:
            job = await job_process(client, server)
            try:
                job.send_signal(signal.SIGSTOP)
                alone = await counter.rate()
                job.send_signal(signal.SIGCONT)
                beside = await counter.rate()
                if job.is_running() and job.status() != psutil.STATUS_ZOMBIE:
                    losses.append(1 - beside / alone)
            except psutil.NoSuchProcess:
                continue  # the job ended within the window
    return losses


def main() -> None:
    """Run the command; exit status 1 above the bar."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.export_streams", description=__doc__
    )
    parser.add_argument("--pairs", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        base = write_base(place / "base", SHAPE)
        adapter = write_adapter(place / "adapter", base, AdapterShape())
        server = start_server(base, place / "server", ("--adapter", f"{NAME}={adapter}"))
        try:
            server.wait_until_ready()
            losses = asyncio.run(measure(server, given.pairs))
        finally:
            server.kill()
    mean = statistics.fmean(losses)
    error = statistics.stdev(losses) / len(losses) ** 0.5
    verdict = "holds" if mean <= BAR else "FAILS"
    sys.stdout.write(
        f"{headline()}\n{STREAMS} streams lose {mean:.1%} ± {error:.1%} of their speed while an adapter is merged,"
        f" {len(losses)} pairs of {WINDOW:g} s (bar {BAR:.0%}: {verdict})\n"
    )
    sys.exit(0 if mean <= BAR else 1)


if __name__ == "__main__":
    main()
