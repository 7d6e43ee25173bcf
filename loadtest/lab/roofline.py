"""The table of docs/roofline.md: `python -m manylora.loadtest.lab.roofline`, on a quiet machine with native kernels.

For each op of a step, all layers together: the bytes that must be read at least once and the multiply-adds, the time
that memory or arithmetic needs for them at the rates that this machine gave in the same run, and what it takes.
"whole step" is the native call for all layers and the head, with what a step costs besides.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from manylora.loadtest.bench.kernels import KernelsBench, NoKernels, open_native
from manylora.loadtest.bench.limits import Limits, Work, measure_limits
from manylora.loadtest.bench.op_rates import OPS, WARM_UP, op_seconds, op_work
from manylora.loadtest.material.checkpoints import SHAPES
from manylora.loadtest.material.decode_steps import decode_step, place_adapters
from manylora.loadtest.material.engines import served
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.random_model import config_of, random_weights
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.step import StepBatch
from manylora.server.model.decoder import Decoder
from manylora.server.model.served import ServedModel

KV_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
RANK = 16


@dataclass(frozen=True, slots=True)
class Line:
    """One op of one step."""

    step: str
    op: str
    work: Work
    seconds: float

    def markdown(self, limits: Limits) -> str:
        """Return the table's row."""
        memory, arithmetic = limits.bounds(self.work)
        bound, what = max((memory, "memory"), (arithmetic, "arithmetic"))
        cells = [
            self.step,
            self.op,
            f"{self.work.nbytes / 1e6:.1f}",
            f"{2 * self.work.multiply_adds / 1e9:.2f}",
            f"{1000 * bound:.3f} ({what})",
            f"{1000 * self.seconds:.3f}",
            f"{100 * bound / self.seconds:.0f} %",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = "| step | op | MB | Gop | least ms | ms | of the limit |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |"


def build(
    kernels: Kernels, shape: str, rows: int, tokens: int, kv_dtype: torch.dtype = torch.bfloat16
) -> ServedModel:
    """Return a random decoder of the shape in NF4 on the native kernels."""
    backend, config = CpuBackend(kernels, torch.bfloat16, kv_dtype=kv_dtype), config_of(SHAPES[shape])
    decoder = Decoder(config, random_weights(config, backend, nf4=True), backend)
    return served(decoder, rows, tokens, rows * RANK)


def steps(model: ServedModel, rows: list[int], context: int, prompt: int) -> Iterator[tuple[str, StepBatch]]:
    """Yield what is measured: rows that decode, of the base and each with its adapter, and a prompt's chunk, if any."""
    adapters = place_adapters(model, [RANK] * max(rows))
    for count in rows:
        yield f"{count} × base", decode_step(model, count, context, [])
        yield f"{count} × own adapter", decode_step(model, count, context, adapters[:count])
    if prompt:
        yield f"prompt of {prompt}, adapter", decode_step(model, 1, prompt, adapters[:1], prompt)


def lines(model: ServedModel, name: str, step: StepBatch, repeats: int) -> Iterator[Line]:
    """Yield the lines of a step."""
    work, seconds = op_work(model, step), op_seconds(model, step, repeats)
    for op in OPS:
        yield Line(name, op, work[op], seconds[op])
    taken = []
    for number in range(repeats + WARM_UP):
        began = time.perf_counter()
        model(step)
        if number >= WARM_UP:
            taken.append(time.perf_counter() - began)
    yield Line(name, "**whole step**", sum(work.values(), Work(0)), statistics.median(taken))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.lab.roofline", description=__doc__)
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the chunk of a prompt; 0: none")
    parser.add_argument("--kv-cache-dtype", default="bfloat16", choices=list(KV_DTYPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--level", help="instruction set; default: the best that this processor has")
    parser.add_argument("--threads", type=int, help="default: one a core")
    options = parser.parse_args()
    try:
        kernels = open_native(KernelsBench(level=options.level, threads=options.threads))
    except (NoKernels, ValueError) as error:
        parser.exit(2, f"roofline: {error}\n")
    torch.manual_seed(0)
    most, kept = max(options.context, options.prompt), KV_DTYPES[options.kv_cache_dtype]
    model = build(kernels, options.model, max(options.rows), most, kept)
    limits = measure_limits(kernels, 7)
    table: list[Line] = []
    for name, step in steps(model, options.rows, options.context, options.prompt):
        table += lines(model, name, step, options.repeats)
        limits = limits.best(measure_limits(kernels, 3))
    print(headline())  # noqa: T201  # the result
    print(f"{kernels.level}, {kernels.threads} threads: {limits}\n\n{HEAD}")  # noqa: T201  # the result
    print(*(line.markdown(limits) for line in table), sep="\n")  # noqa: T201  # the result


if __name__ == "__main__":
    main()
