"""Whether base-only traffic is as fast with a thousand adapters registered as with none: two servers, in alternation.

Two processes are never equally fast, whatever they hold; so the adapters change sides half-way, and what belongs to
the processes cancels out.
"""

import asyncio
import math
import statistics
import time
from dataclasses import dataclass

from manylora.loadtest.checks.bars.material import prompts
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.manylora_client import Ask, Client

TOLERANCE = 0.02
MAX_ERROR = 0.01
"""A ratio that is less sure than this proves nothing."""


@dataclass(frozen=True, slots=True)
class SpeedSize:
    """How much is measured."""

    adapters: int = 1000
    rounds: int = 200
    """For each side on which the adapters are."""
    streams: int = 8
    max_tokens: int = 32
    judged: bool = True
    """Whether the ratio decides; a few rounds on a busy machine can't."""


async def base_speed(
    report: Report, clients: tuple[Client, Client], base: str, source: str, size: SpeedSize
) -> None:
    """Add the ratio to ``report``."""
    names = [f"tenant/{i}" for i in range(size.adapters)]
    with_adapters, without = clients
    halves: list[list[float]] = []
    for _ in range(2):
        for name in names:
            await with_adapters.register(name, source)
        halves.append(
            [await _pair(with_adapters, without, base, number, size) for number in range(size.rounds)]
        )
        for name in names:
            await with_adapters.delete(name)
        with_adapters, without = without, with_adapters
    first, second = (statistics.median(half) for half in halves)
    ratio = math.sqrt(first * second)
    # Of a median's logarithm: 1.25 times that of the mean.
    errors = [1.25 * statistics.stdev(map(math.log, half)) / math.sqrt(len(half)) for half in halves]
    error = math.hypot(*errors) / 2
    promise = f"base-only tokens/s with {size.adapters} adapters registered, over those with none: 1 ± {TOLERANCE:g}"
    measured = f"{ratio:.3f} ± {error:.3f} (sides: {first:.3f}, {second:.3f})"
    if size.judged:
        report.check(promise, measured, abs(ratio - 1) <= TOLERANCE and error <= MAX_ERROR)
    else:
        report.note(
            f"base-only tokens/s with {size.adapters} adapters over those with none: {measured}, not judged"
        )


async def _pair(loaded: Client, empty: Client, base: str, number: int, size: SpeedSize) -> float:
    """Return the speed of the one divided by that of the other; they take turns in going first."""
    seconds = {}
    for client in (loaded, empty) if number % 2 else (empty, loaded):
        asks = [
            Ask(base, prompt, size.max_tokens) for prompt in prompts([20] * size.streams, seed=100 + number)
        ]
        began = time.perf_counter()
        answers = await asyncio.gather(*map(client.complete, asks))
        seconds[client] = time.perf_counter() - began
        assert all(answer.complete for answer in answers)
    return seconds[empty] / seconds[loaded]
