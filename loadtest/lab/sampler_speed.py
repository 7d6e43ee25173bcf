"""Times Sampler.sample and Detokenizer.push: milliseconds a step by kind of row, on random logits.

Run it with ``python -m manylora.loadtest.lab.sampler_speed``. It measures no model and no HTTP.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.text_table import milliseconds, text_table
from manylora.server.engine.detokenizer import Detokenizer
from manylora.server.engine.request import SamplingParams
from manylora.server.engine.sampler import SampledToken, Sampler, SamplerState, SamplingRow
from manylora.server.kernels.choose import choose_backend

FLAT, PEAKED = 0.6, 3.0
"""Standard deviations of the logits: at 0.6 a nucleus of 0.9 is two thirds of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of row to time."""

    name: str
    params: SamplingParams
    spread: float = FLAT


CASES = (
    Case("greedy", SamplingParams(temperature=0)),
    Case("temperature 0.8", SamplingParams(temperature=0.8)),
    Case("top_p 0.9, flat", SamplingParams(top_p=0.9)),
    Case("top_p 0.9, peaked", SamplingParams(top_p=0.9), PEAKED),
    Case("temperature 0.8, top_p 0.9, flat", SamplingParams(temperature=0.8, top_p=0.9)),
    Case("top_k 50, top_p 0.9", SamplingParams(top_k=50, top_p=0.9)),
    Case("greedy, three penalties", SamplingParams(0, 1.0, 0, 0.0, 0.5, 0.5, 1.1)),
    Case("top_p 0.9, three penalties", SamplingParams(1, 0.9, 0, 0.0, 0.5, 0.5, 1.1)),
    Case("greedy, logprobs 5", SamplingParams(temperature=0, logprobs=5)),
    Case("top_p 0.9, logprobs 5", SamplingParams(top_p=0.9, logprobs=5)),
)


def _rows(params: SamplingParams, count: int) -> list[SamplingRow]:
    """Rows with prompts of 500 tokens and outputs of 500."""
    rows = []
    for i in range(count):
        own = replace(params, seed=i)
        state = SamplerState(own, range(500), i)
        for token_id in range(250, 750):
            state.append(token_id)
        rows.append(SamplingRow(own, state))
    return rows


def step_seconds(sampler: Sampler, logits: Tensor, params: SamplingParams, steps: int) -> tuple[float, float]:
    """Return the median and the best time of one step over all rows of ``logits`` [n, V], after a warm-up."""
    rows = _rows(params, len(logits))
    times = []
    for step in range(steps + 10):
        start = time.perf_counter()
        results = sampler.sample(logits, rows)
        if logits.is_cuda:
            torch.cuda.synchronize()
        if step >= 10:
            times.append(time.perf_counter() - start)
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, SampledToken):
                row.state.append(result.token_id)
    return statistics.median(times), min(times)


class _Bytes:
    strips_first_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def push_seconds(tokens: int) -> float:
    """Return the time that one token costs in the Detokenizer, on text of two and three bytes a character."""
    ids = list(("é語" * tokens).encode())[:tokens]
    detokenizer = Detokenizer(_Bytes(), [])
    start = time.perf_counter()
    for token_id in ids:
        detokenizer.push(token_id)
    return (time.perf_counter() - start) / len(ids)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--kernels", default="plain", help="plain (torch), auto, or a level of the native ones"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = choose_backend(torch.device(options.device), torch.float32, options.kernels)
    sampler = Sampler(options.vocabulary, options.device, kernels.sampling)
    sizes = (1, 8, 32)
    noise = torch.randn(max(sizes), options.vocabulary, generator=torch.Generator().manual_seed(0))
    noise = noise.to(options.device)
    until = time.perf_counter() + 2  # threads need a moment to spread over the cores
    while time.perf_counter() < until:
        step_seconds(sampler, noise, CASES[2].params, 1)
    rows = []
    for case in CASES:
        logits = noise * case.spread
        seconds = [step_seconds(sampler, logits[:size], case.params, options.steps) for size in sizes]
        rows.append(
            [case.name, *(f"{milliseconds(middle)} ({milliseconds(least)})" for middle, least in seconds)]
        )
    print(f"Sampling, ms a step: median (best). V {options.vocabulary}, {options.device}")  # noqa: T201  # the result
    print(headline(), end="\n\n")  # noqa: T201  # the result
    print(text_table(["rows", *map(str, sizes)], rows), end="\n\n")  # noqa: T201  # the result
    print(f"Detokenizer.push: {1e6 * push_seconds(100_000):.2f} µs a token")  # noqa: T201  # the result


if __name__ == "__main__":
    main()
