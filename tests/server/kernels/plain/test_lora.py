"""Grouped LoRA over every traffic against a plain loop over spans."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.server.kernels.plain.invariance import MATMUL_LIMITS
from manylora.server.kernels.plain.lora import build_lora_metadata
from manylora.server.kernels.reference import lora as reference_lora
from manylora.server.kernels.step import AdapterRanges, LoraSpan, RankRange

CPU = torch.device("cpu")
# Relative to the size of the deltas.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
Mixture = tuple[tuple[AdapterRanges, float], ...]


def deal(ranks: Sequence[int], modules: Sequence[str] = ("q_proj", "o_proj")) -> list[AdapterRanges]:
    """Give each adapter its rows, in another order than the adapters', with gaps."""
    starts, row = {}, 3
    for number in np.random.default_rng(len(ranks)).permutation(len(ranks)):
        starts[int(number)] = row
        row += ranks[int(number)] + int(number) % 3
    return [dict.fromkeys(modules, RankRange(starts[number], rank)) for number, rank in enumerate(ranks)]


def spans_of(lengths: Sequence[int], mixtures: Sequence[Mixture]) -> list[LoraSpan]:
    starts = np.cumsum([0, *lengths])
    return [
        LoraSpan(int(start), length, mixture)
        for start, length, mixture in zip(starts, lengths, mixtures, strict=False)
    ]


def identical(count: int, adapters: int) -> list[int]:
    return [0] * count


def distinct(count: int, adapters: int) -> list[int]:
    return [number % adapters for number in range(count)]


def uniform(count: int, adapters: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(0).integers(0, adapters, count)]


def zipf(count: int, adapters: int) -> list[int]:
    weights = 1.5 ** -np.arange(adapters)
    return [int(n) for n in np.random.default_rng(0).choice(adapters, count, p=weights / weights.sum())]


def mostly_base(count: int, adapters: int) -> list[int]:
    return [number % adapters if number % 4 == 1 else -1 for number in range(count)]


TRAFFIC: list[Callable[[int, int], list[int]]] = [identical, distinct, uniform, zipf, mostly_base]
DECODE = [1] * 37
# 330 tokens: past what shares one masked product.
PREFILL = [1, 5, 64, 2, 1, 129, 17, 100, 1, 10]
RANKS = {"one rank": [8] * 12, "mixed ranks": [4, 8, 64, 1, 16, 3, 128, 5, 8, 32, 200, 7]}


def factors(dtype: torch.dtype, wide: int, out: int, rows: int = 700) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rows, wide, generator=generator) * wide**-0.5
    return a.to(dtype), (torch.randn(rows, out, generator=generator) * 0.2).to(dtype)


def deltas(
    spans: Sequence[LoraSpan],
    dtype: torch.dtype,
    wide: int = 72,
    out: int = 40,
    module: str = "q_proj",
    spoil: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ours and the loop's, both without the base's output. ``spoil`` changes A, B and the input first."""
    tokens = max(
        max((span.start + span.length for span in spans), default=0), MATMUL_LIMITS[dtype].least_rows
    )
    a, b = factors(dtype, wide, out)
    x = torch.randn(tokens, wide, generator=torch.Generator().manual_seed(2)).to(dtype)
    if spoil is not None:
        spoil(a, b, x)
    ours = torch.zeros(tokens, out, dtype=dtype)
    metadata = build_lora_metadata(spans, tokens, CPU, dtype)
    if metadata is not None:
        metadata.add(module, x, a, b, ours)
    return ours.float(), reference_lora(x, a, b, module, spans)


def assert_alike(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    scale = float(theirs.abs().max())
    assert scale > 0.1
    assert float((ours - theirs).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("lengths", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_traffic(
    traffic: Callable[[int, int], list[int]], ranks: str, lengths: list[int], dtype: torch.dtype
) -> None:
    adapters = deal(RANKS[ranks])
    chosen = traffic(len(lengths), len(adapters))
    spans = spans_of(lengths, [((adapters[n], 1.0),) if n >= 0 else () for n in chosen])
    ours, theirs = deltas(spans, dtype)
    assert_alike(ours, theirs, dtype)
    base = [span for span in spans if not span.adapters]
    for span in base:
        assert not ours[span.start : span.start + span.length].any()


@pytest.mark.parametrize(("wide", "out"), [(1, 1), (7, 3), (33, 129), (896, 128), (100, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes(wide: int, out: int, dtype: torch.dtype) -> None:
    adapters = deal(RANKS["mixed ranks"])
    spans = spans_of([1, 3, 50, 1, 20], [((adapters[n], 1.0),) for n in (2, 0, 10, 3, 6)])
    assert_alike(*deltas(spans, dtype, wide, out), dtype)


@pytest.mark.parametrize("lengths", [[1] * 9, [40, 1, 90, 1, 1, 3, 64, 1, 1]], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_several_weighted_adapters_on_a_row(lengths: list[int], dtype: torch.dtype) -> None:
    first, second, third, large = (deal([4, 16, 8, 150])[n] for n in range(4))
    mixtures: list[Mixture] = [
        ((first, 0.7), (second, -0.4)),
        ((second, 1.0),),
        ((third, 0.3), (first, 0.3), (second, 0.4)),
        (),
        ((large, 2.0), (first, 0.5)),
        ((second, 0.25), (first, 1.5)),
        ((first, 1.0),),
        ((first, 0.0), (third, 1.0)),
        ((first, 0.5), (first, 0.5)),
    ]
    assert_alike(*deltas(spans_of(lengths, mixtures), dtype), dtype)


def test_modules_that_only_some_adapters_target() -> None:
    attention, mlp = deal([8], ["q_proj", "v_proj"])[0], deal([4], ["down_proj"])[0]
    spans = spans_of([3, 4], [((attention, 1.0),), ((mlp, 1.0),)])
    for module, tokens in (("q_proj", slice(0, 3)), ("down_proj", slice(3, 7))):
        ours, theirs = deltas(spans, torch.float32, module=module)
        assert_alike(ours, theirs, torch.float32)
        touched = ours.any(dim=1).nonzero().view(-1).tolist()
        assert touched == list(range(tokens.start, tokens.stop))
    ours, _ = deltas(spans, torch.float32, module="gate_proj")
    assert not ours.any()


@pytest.mark.parametrize(
    "spans",
    [
        [],
        spans_of([3, 5], [(), ()]),
        spans_of([0, 4], [((deal([4])[0], 1.0),), ()]),
        spans_of([2], [(({}, 1.0),)]),
    ],
    ids=["no spans", "base only", "an empty span", "an adapter of nothing"],
)
def test_base_steps_need_no_metadata(spans: list[LoraSpan]) -> None:
    assert build_lora_metadata(spans, 16, CPU, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_span_alone_has_the_same_bits(dtype: torch.dtype) -> None:
    adapters = deal(RANKS["mixed ranks"])
    lengths = [1, 20, 1, 1, 64, 3, 1, 2, 1, 1]
    mixtures: list[Mixture] = [((adapters[n], 1.0),) for n in (2, 0, 6, 2, 10, 3, 1)]
    mixtures += [((adapters[0], 0.5), (adapters[4], 0.25)), (), ((adapters[11], 1.0),)]
    spans = spans_of(lengths, mixtures)
    together, _ = deltas(spans, dtype)
    for span in spans:
        alone, _ = deltas([span, LoraSpan(sum(lengths), 0, ())], dtype)
        tokens = slice(span.start, span.start + span.length)
        assert torch.equal(alone[tokens], together[tokens])


# Each way past what the dtype holds: in the product with A, in an input that was infinite already.
SPOILS = ("a large A", "an infinite row", "a row of NaN")


@pytest.mark.parametrize("how", SPOILS)
@pytest.mark.parametrize("lengths", [[1] * 10, PREFILL], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_adapter_that_overflows_is_felt_by_no_other_row(
    how: str, lengths: list[int], dtype: torch.dtype
) -> None:
    """The rows of one adapter, or its factors, aren't finite: all others get what they get beside a sound one."""
    adapters = deal(RANKS["mixed ranks"])
    chosen = [0, 1, -1, 2, 1, 10, 1, -1, 11, 5]
    mixtures: list[Mixture] = [((adapters[n], 1.0),) if n >= 0 else () for n in chosen]
    mixtures[3], mixtures[9] = (
        ((adapters[2], 0.5), (adapters[5], -2.0)),
        ((adapters[5], 1.0), (adapters[1], 0.0)),
    )
    spans = spans_of(lengths, mixtures)
    bad = [span for span, n in zip(spans, chosen, strict=True) if n == 1]
    owned = adapters[1]["q_proj"]

    def spoil(a: Tensor, b: Tensor, x: Tensor) -> None:
        largest = torch.finfo(dtype).max
        if how == "a large A":
            # With both signs, so that sums become inf - inf too.
            signs = torch.arange(a.shape[1]) % 2 * 2 - 1
            a[owned.start : owned.start + owned.rank] = (largest * signs).to(dtype)
            b[owned.start : owned.start + owned.rank] = largest
        for span in bad:
            if how != "a large A":
                x[span.start : span.start + span.length] = (
                    torch.inf if how == "an infinite row" else torch.nan
                )

    sound, _ = deltas(spans, dtype)
    found, _ = deltas(spans, dtype, spoil=spoil)
    for span in bad:
        tokens = slice(span.start, span.start + span.length)
        assert not found[tokens].isfinite().all()
        found[tokens] = sound[tokens]
    assert torch.equal(found, sound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("wide", "out", "ranks"), [(96, 128, (8, 4, 16)), (40, 64, (1, 2, 3))])
def test_few_tokens_of_small_adapters_have_the_bits_that_each_has_alone(
    wide: int, out: int, ranks: Sequence[int], dtype: torch.dtype
) -> None:
    """Two tokens of a small rank make a product so small that torch has another kernel for it."""
    a, b = factors(dtype, wide, out)
    dealt = deal(ranks, ("q_proj",))
    generator = np.random.default_rng(0)
    for _ in range(200):
        picks = [generator.permutation(3)[: generator.integers(1, 4)] for _ in range(6)]
        mixtures: list[Mixture] = [
            tuple((dealt[pick], float(generator.choice((1, 0.7, -2)))) for pick in row) for row in picks
        ]
        spans = spans_of([1] * len(mixtures), mixtures)
        x = torch.from_numpy(generator.standard_normal((16, wide))).to(dtype)
        before = torch.from_numpy(generator.standard_normal((16, out))).to(dtype)
        together = after(spans, x, before, a, b)
        least = MATMUL_LIMITS[dtype].least_rows
        for row, span in enumerate(spans):
            own, kept = torch.zeros(least, wide, dtype=dtype), torch.zeros(least, out, dtype=dtype)
            own[0], kept[0] = x[row], before[row]
            alone = after([LoraSpan(0, 1, span.adapters)], own, kept, a, b)
            assert torch.equal(alone[0], together[row])


def after(spans: Sequence[LoraSpan], x: Tensor, before: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``before`` with what the adapters add."""
    metadata = build_lora_metadata(spans, x.shape[0], x.device, x.dtype)
    assert metadata is not None
    out = before.clone()
    metadata.add("q_proj", x, a, b, out)
    return out
