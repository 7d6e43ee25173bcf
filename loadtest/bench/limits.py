"""What the machine gives, measured in the run whose figures are held against it: memory, integer and float products."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.memory import WeightMemory

STREAMED = 120_000_000
"""Bytes that are gone through in turn: more than any cache keeps."""
READ_BYTES = 1 << 22
DOT_ROUNDS = 50_000
FLOAT_SIZE = 512


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation must do at least: read each byte once, and multiply and add."""

    nbytes: float
    integer: float = 0.0
    """Multiply-adds of bytes."""
    real: float = 0.0
    """Multiply-adds of floats."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.nbytes + other.nbytes, self.integer + other.integer, self.real + other.real)

    @property
    def multiply_adds(self) -> float:
        """Of both kinds."""
        return self.integer + self.real


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine gives the same threads."""

    bytes_a_second: float
    multiply_adds_a_second: float
    """Integer dot products of what lies in the nearest cache."""
    floats_a_second: float = float("inf")
    """Multiply-adds of float32, as torch's matrix product has them."""

    def bounds(self, work: Work) -> tuple[float, float]:
        """Return the seconds that memory and arithmetic need for it, each alone."""
        arithmetic = work.integer / self.multiply_adds_a_second + work.real / self.floats_a_second
        return work.nbytes / self.bytes_a_second, arithmetic

    def best(self, other: "Limits") -> "Limits":
        """Return the better of two measurements, each of its parts: what else runs only takes away."""
        return Limits(
            max(self.bytes_a_second, other.bytes_a_second),
            max(self.multiply_adds_a_second, other.multiply_adds_a_second),
            max(self.floats_a_second, other.floats_a_second),
        )

    def share(self, work: Work, seconds: float) -> float:
        """Return how near it comes to the nearer limit."""
        return max(self.bounds(work)) / seconds

    def __str__(self) -> str:
        return (
            f"memory {self.bytes_a_second / 1e9:.1f} GB/s, integer dots {2 * self.multiply_adds_a_second / 1e9:.0f} "
            f"GOP/s, float32 products {2 * self.floats_a_second / 1e9:.0f} GOP/s"
        )

    def to_json(self) -> dict[str, float]:
        """Return the numbers as JSON values."""
        return {
            "bytes_per_second": self.bytes_a_second,
            "integer_multiply_adds_per_second": self.multiply_adds_a_second,
            "float_multiply_adds_per_second": self.floats_a_second,
        }


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
    # In large pages, as packed weights are.
    data = WeightMemory().empty((STREAMED // READ_BYTES, words), torch.int64).fill_(1)
    reads = [partial(kernels.call, "read_words", row.data_ptr(), words) for row in data]
    a_round = kernels.call("dot_words", 1)
    dots = timed([partial(kernels.call, "dot_words", DOT_ROUNDS)], 40 * times)
    return Limits(
        READ_BYTES / timed(reads, times),
        kernels.threads * DOT_ROUNDS * a_round / dots,
        _float_products(kernels.threads, 10 * times),
    )


def _float_products(threads: int, times: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = torch.randn(FLOAT_SIZE, FLOAT_SIZE)
        return FLOAT_SIZE**3 / timed([partial(torch.mm, matrix, matrix)], times)
    finally:
        torch.set_num_threads(before)
