"""Weighted adapters: a weight is a float32's value in every dtype, and neither company nor rows change a bit."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.server.kernels.plain.invariance import MATMUL_LIMITS
from manylora.server.kernels.plain.lora import build_lora_metadata
from manylora.server.kernels.reference import lora as reference_lora
from manylora.server.kernels.step import AdapterRanges, LoraSpan, RankRange

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 4, 8, 16, 64, 3, 24, 32, 8, 12)
WIDE, OUT, ROWS = 72, 40, 400
Weighted = tuple[tuple[int, float], ...]
"""(number of an adapter, weight) pairs."""


def added(spans: Sequence[LoraSpan], x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return what q_proj gets, in x's dtype."""
    out = torch.zeros(len(x), b.shape[1], dtype=x.dtype)
    metadata = build_lora_metadata(spans, len(x), CPU, x.dtype)
    assert metadata is not None
    metadata.add("q_proj", x, a, b, out)
    return out


@pytest.mark.parametrize("weight", [0.7, -0.3, 1 / 3, 1.1, 1e-7, 1e5, -2.6e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_a_float32_whatever_is_computed_in(dtype: torch.dtype, weight: float) -> None:
    """With A and B that change nothing, the only error left is that of rounding the weighted value once."""
    size = 32
    # Each within what float16 holds once it is weighted.
    x = torch.rand(64, size, generator=torch.Generator().manual_seed(0)) / max(1.0, abs(weight))
    ones = torch.eye(size, dtype=dtype)
    spans = [
        LoraSpan(0, 40, (({"q_proj": RankRange(0, size)}, weight),)),
        # Unweighted neighbours, in the same product.
        LoraSpan(40, 24, (({"q_proj": RankRange(0, size)}, 1.0),)),
    ]
    found = added(spans, x.to(dtype), ones, ones)
    right = reference_lora(x.to(dtype), ones, ones, "q_proj", spans)
    assert torch.equal(found, right.to(dtype))
    assert found[:40].any()


def random_mixtures(count: int, seed: int) -> list[Weighted]:
    """Base, single adapters, and mixtures of 2 to 8 parts with weights of either sign, below and above 1."""
    rng = np.random.default_rng(seed)
    found: list[Weighted] = [(), ((3, 1.0),)]
    for size in rng.integers(1, 9, count):
        ids = sorted(int(i) for i in rng.choice(len(RANKS), size, replace=False))
        found.append(tuple((i, float(np.float32(rng.uniform(-1.5, 1.5)))) for i in ids))
    return found


class Rows:
    """The same adapters in an arena, in an order of rows that ``seed`` decides."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.a = torch.randn(ROWS, WIDE, generator=noise).to(dtype)
        self.b = torch.randn(ROWS, OUT, generator=noise).to(dtype)
        self.ranges: dict[int, AdapterRanges] = {}
        start = seed % 5
        for number in np.random.default_rng(seed).permutation(len(RANKS)).tolist():
            rank = RANKS[number]
            made = torch.Generator().manual_seed(number)
            self.a[start : start + rank] = (torch.randn(rank, WIDE, generator=made) * WIDE**-0.5).to(dtype)
            self.b[start : start + rank] = torch.randn(rank, OUT, generator=made).to(dtype)
            self.ranges[number] = {"q_proj": RankRange(start, rank)}
            start += rank + number % 3

    def spans(self, lengths: Sequence[int], mixtures: Sequence[Weighted]) -> list[LoraSpan]:
        starts = np.cumsum([0, *lengths]).tolist()
        return [
            LoraSpan(start, length, tuple((self.ranges[i], weight) for i, weight in mixture))
            for start, length, mixture in zip(starts, lengths, mixtures, strict=False)
        ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_mixtures_have_the_bits_that_each_has_alone_wherever_its_parts_lie(
    dtype: torch.dtype, length: int, seed: int
) -> None:
    mixtures = random_mixtures(16, seed)
    lengths = [length] * len(mixtures)
    tokens = max(sum(lengths), MATMUL_LIMITS[dtype].least_rows)
    x = torch.randn(tokens, WIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rows, elsewhere = Rows(dtype, seed), Rows(dtype, seed + 100)
    together = added(rows.spans(lengths, mixtures), x, rows.a, rows.b)
    assert torch.equal(together, added(elsewhere.spans(lengths, mixtures), x, elsewhere.a, elsewhere.b))
    for span, mixture in zip(elsewhere.spans(lengths, mixtures), mixtures, strict=True):
        part = slice(span.start, span.start + length)
        if mixture:
            assert torch.equal(added([span], x, elsewhere.a, elsewhere.b)[part], together[part])
        else:
            assert not together[part].any()
    if dtype is torch.float32:
        right = reference_lora(x, rows.a, rows.b, "q_proj", rows.spans(lengths, mixtures))
        assert float((together - right).abs().max()) <= 2e-6 * float(right.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_ranks_before_it_change_no_bit_of_an_adapter(dtype: torch.dtype) -> None:
    """A processor may add the terms of a sum in pairs; one sum in 100,000 tells, so many are made."""
    ranks, out = (3, 32, 5, 31, 16, 1, 24, 32), 20_000
    starts = np.cumsum([7, *ranks]).tolist()
    ranges: list[AdapterRanges] = [
        {"q_proj": RankRange(start, rank)} for start, rank in zip(starts, ranks, strict=False)
    ]
    noise = torch.Generator().manual_seed(5)
    tokens = max(2 * len(ranks), MATMUL_LIMITS[dtype].least_rows)
    x = torch.randn(tokens, WIDE, generator=noise).to(dtype)
    a = (torch.randn(200, WIDE, generator=noise) * WIDE**-0.5).to(dtype)
    b = torch.randn(200, out, generator=noise).to(dtype)
    uses: list[tuple[tuple[AdapterRanges, float], ...]] = [((each, 1.0),) for each in ranges]
    uses += [((one, 0.7), (other, -1.3)) for one, other in zip(ranges, ranges[1:] + ranges[:1], strict=True)]
    spans = [LoraSpan(number, 1, use) for number, use in enumerate(uses)]
    together = added(spans, x, a, b)
    for number, span in enumerate(spans):
        assert torch.equal(added([span], x, a, b)[number], together[number])
