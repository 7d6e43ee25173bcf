"""Times the native kernels' linear layers, random weights streamed from memory, beside what the machine gives.

Run it with ``python -m manylora.loadtest.bench.kernels`` on a quiet machine. For each shape and number of rows: GOP/s
(a multiply-add is two), GB/s of packed weights read, and the larger of their shares of two limits that are measured
first: reading memory, and integer dot products of what lies in the nearest cache. Each product is timed by itself,
the rounding of activations included, and a tenth of the times lies below the one that counts: what else runs on the
machine is felt little.
"""

import argparse
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.text_table import text_table
from manylora.quant.dense import DenseTensor
from manylora.quant.int8 import GROUP, Int8Tensor
from manylora.quant.nf4 import BLOCKSIZE, Nf4Tensor
from manylora.server.kernels.backend import WeightSource
from manylora.server.kernels.cpu.library import Kernels, Unavailable, open_kernels
from manylora.server.kernels.cpu.pack import PackedMatrix, pack

SHAPES = ("128x896", "896x896", "4864x896", "896x4864", "151936x896")
"""Those of Qwen2.5-0.5B: out x in."""
ROWS = (1, 2, 4, 6, 8, 16, 32, 64, 128, 512)
FORMS = ("nf4", "int8", "bf16")
STREAMED = 120_000_000
"""Bytes of weights that are gone through in turn: more than any cache keeps."""
FEW_ROWS = 64
"""Up to so many rows weights come from memory; with more, the time goes into products, and fewer matrices will do."""
READ_BYTES = 1 << 22
DOT_ROUNDS = 50_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine gives the same threads."""

    bytes_a_second: float
    multiply_adds_a_second: float


@dataclass(frozen=True, slots=True)
class Rate:
    """One product's rate."""

    shape: tuple[int, int]
    rows: int
    nbytes: int
    seconds: float

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds a second."""
        return math.prod(self.shape) * self.rows / self.seconds

    @property
    def read(self) -> float:
        """Bytes of weights a second, each read once."""
        return self.nbytes / self.seconds

    def share(self, limits: Limits) -> float:
        """Return how near it comes to the nearer limit."""
        return max(self.read / limits.bytes_a_second, self.multiply_adds / limits.multiply_adds_a_second)


def timed(calls: Sequence[Callable[[], object]], times: int) -> float:
    """Go through ``calls`` so many times; return the first decile of the seconds that one takes."""
    taken = []
    for _ in range(times):
        for call in calls:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 10]


def measure_limits(kernels: Kernels, times: int) -> Limits:
    """Measure the machine."""
    words = READ_BYTES // 8
    data = torch.ones(STREAMED // READ_BYTES, words, dtype=torch.int64)
    reads = [partial(kernels.call, "read_words", row.data_ptr(), words) for row in data]
    a_round = kernels.call("dot_words", 1)
    dots = timed([partial(kernels.call, "dot_words", DOT_ROUNDS)], 40 * times)
    return Limits(READ_BYTES / timed(reads, times), kernels.threads * DOT_ROUNDS * a_round / dots)


def random_source(form: str, out: int, wide: int) -> WeightSource:
    """Return a matrix of a form, its codes drawn at random."""
    if form == "nf4":
        codes = torch.randint(0, 256, (out * wide // 2,), dtype=torch.uint8)
        return Nf4Tensor(codes, torch.rand(out * wide // BLOCKSIZE), (out, wide))
    if form == "int8":
        return Int8Tensor(
            torch.randint(-127, 128, (out, wide), dtype=torch.int8), torch.rand(out, -(-wide // GROUP))
        )
    return DenseTensor(torch.randn(out, wide, dtype=torch.bfloat16))


def rates(
    kernels: Kernels, form: str, shape: tuple[int, int], rows: tuple[int, ...], times: int
) -> Iterator[Rate]:
    """Yield the rates of a shape, over as many matrices as no cache keeps."""
    first = pack(random_source(form, *shape), None, kernels)
    more = max(0, math.ceil(STREAMED / first.nbytes) - 1)
    matrices: list[PackedMatrix] = [
        first,
        *(pack(random_source(form, *shape), None, kernels) for _ in range(more)),
    ]
    structures = [matrix.structure() for matrix in matrices]
    addresses = [ctypes.addressof(structure) for structure in structures]
    for count in rows:
        x, y = torch.randn(count, shape[1]), torch.empty(count, shape[0])
        some = addresses if count <= FEW_ROWS else addresses[: max(1, len(addresses) // 8)]
        calls = [partial(kernels.call, "linear", at, x.data_ptr(), count, y.data_ptr()) for at in some]
        yield Rate(shape, count, first.nbytes, timed(calls, times))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", help="instruction set; default: the best that this processor has")
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--form", choices=FORMS, default="nf4")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--times", type=int, default=7, help="how often each matrix is gone through")
    options = parser.parse_args()
    kernels = open_kernels(options.level, options.threads)
    if isinstance(kernels, Unavailable):
        parser.exit(2, f"kernel_rates: {kernels.reason}\n")
    print(headline())  # noqa: T201  # the result
    limits = measure_limits(kernels, options.times)
    print(  # noqa: T201  # the result
        f"{kernels.level}, {kernels.threads} threads: memory {limits.bytes_a_second / 1e9:.1f} GB/s,"
        f" integer dots {2 * limits.multiply_adds_a_second / 1e9:.0f} GOP/s"
    )
    table = []
    for text in options.shapes:
        out, wide = map(int, text.split("x"))
        for rate in rates(kernels, options.form, (out, wide), tuple(options.rows), options.times):
            gops, read = 2 * rate.multiply_adds / 1e9, rate.read / 1e9
            table.append(
                (
                    f"{options.form} {text}",
                    str(rate.rows),
                    f"{gops:.0f}",
                    f"{read:.1f}",
                    f"{rate.share(limits):.0%}",
                )
            )
    print(text_table(("matrix", "rows", "GOP/s", "GB/s", "of the limit"), table))  # noqa: T201  # the result


if __name__ == "__main__":
    main()
