"""Keys and values in 8 bits: how far they are off, and what is not finite."""

import math

import pytest
import torch

from manylora.server.kernels.plain.attention import attend, plan_attention
from manylora.server.kernels.plain.kv_cache import CachedRows, PlainKVCache, bytes_per_block
from manylora.server.kernels.plain.kv_int8 import GROUP, dequantize_kv, groups_of, quantize_kv
from manylora.server.kernels.shape import DecoderShape
from tests.server.kernels.plain.test_attention import MIXED, make_case

CPU = torch.device("cpu")
SHAPE = DecoderShape(2, 4, 2, 80, {}, ({}, {}))


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_value_is_within_half_a_step_of_its_group(dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    x[..., 5] *= 30  # a channel that is many times the others
    codes, scales = quantize_kv(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert scales.shape == (50, 3, groups_of(dim))
    off = (dequantize_kv(codes, scales) - x.float()).abs()
    for first in range(0, dim, GROUP):
        group = slice(first, first + GROUP)
        most = x[..., group].float().abs().amax(-1, keepdim=True)
        assert (off[..., group] <= most / 127 * 0.503).all()  # bfloat16 has 8 bits of a scale


def test_the_largest_values_are_given_back_finite() -> None:
    most = torch.finfo(torch.float32).max
    assert dequantize_kv(*quantize_kv(torch.tensor([most, -most, 1.0]))).isfinite().all()


def test_small_and_no_values_are_zeros() -> None:
    codes, scales = quantize_kv(torch.stack((torch.zeros(40), torch.full((40,), 1e-37))))
    assert not codes.any()
    assert not scales.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_that_is_not_finite_is_nan_and_its_neighbours_are_not(bad: float) -> None:
    x = torch.ones(2, 96)
    x[1, 40] = bad
    codes, scales = quantize_kv(x)
    found = dequantize_kv(codes, scales)
    assert found[1, 32:64].isnan().all()
    assert (found[0] == found[1, 0]).all()
    assert found[1, [*range(32), *range(64, 96)]].isfinite().all()


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(14, 2, 64), (6, 2, 24)])
def test_attention_over_codes_has_the_bits_of_attention_over_what_they_stand_for(
    heads: tuple[int, int, int], window: int | None
) -> None:
    case = make_case(MIXED, heads, 16, torch.float32)
    plan, found = plan_attention(case.metadata, 16, {window}, CPU), []
    kept = [quantize_kv(cache) for cache in (case.k_cache, case.v_cache)]
    for keys, values in (
        [CachedRows(*each) for each in kept],
        [CachedRows(dequantize_kv(*each)) for each in kept],
    ):
        found.append(torch.zeros_like(case.q))
        attend(case.q, keys, values, plan, window, found[-1])
    assert torch.equal(*found)
    exact = torch.zeros_like(case.q)
    attend(case.q, CachedRows(case.k_cache), CachedRows(case.v_cache), plan, window, exact)
    assert 0 < float((found[0] - exact).norm() / exact.norm()) < 0.02


def test_slots_that_are_not_finite_are_told() -> None:
    kv = PlainKVCache(SHAPE, 3, 4, torch.int8, CPU)
    slots = torch.tensor([1, 5, 9, 15])
    for number, (layer, half, bad) in enumerate(
        ((0, 0, 1.0), (0, 1, math.nan), (1, 0, math.inf), (1, 1, 2.0))
    ):
        values = torch.ones(1, 2, 80)
        values[0, 1, 79] = bad
        kv.layers[layer][half].write(slots[number : number + 1], values)
    assert kv.finite(slots).tolist() == [True, False, False, True]
    assert torch.equal(kv.layers[1][1].gather(slots)[3, 1, 32:64], torch.ones(32) * 127 * kv_step())


def kv_step() -> float:
    """The scale of ones."""
    return float(quantize_kv(torch.ones(32))[1].float())


def test_bytes_are_what_codes_and_scales_take() -> None:
    kv = PlainKVCache(SHAPE, 3, 4, torch.int8, CPU)
    assert bytes_per_block(SHAPE, 4, torch.int8) == 2 * 2 * 4 * 2 * (80 + 3 * 2)
    assert kv.nbytes == 4 * bytes_per_block(SHAPE, 4, torch.int8)
