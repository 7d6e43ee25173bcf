"""Weights quantised natively: the codes and scales of quant/, bit for bit."""

from collections.abc import Callable

import pytest
import torch

from manylora.quant.int8 import quantize_int8
from manylora.quant.nf4 import NestedScales, quantize_nf4
from manylora.server.kernels.cpu.encode import encode_int8, encode_nf4
from manylora.server.kernels.cpu.library import Kernels
from tests.server.kernels.cpu.matrices import normal

SHAPES = ((1, 64), (33, 192), (5, 100), (7, 13), (700, 896))
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return weights with a block of zeros, if there is room, and one of values near float32's least."""
    weight = normal(*shape)
    weight.view(-1)[64:128] = 0
    weight.view(-1)[128:192] *= 1e-40
    return weight.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_nf4_has_the_same_codes(shape: tuple[int, int], dtype: torch.dtype, kernels: Kernels) -> None:
    weight = weights(shape, dtype)
    want, got = quantize_nf4(weight), encode_nf4(weight, kernels)
    assert (got.shape, got.blocksize) == (want.shape, want.blocksize)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales(), want.scales())


def test_every_bf16_has_the_same_code(kernels: Kernels) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    weight = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))].view(1, -1)
    for some in (weight, weight.clamp(-1, 1)):
        assert torch.equal(encode_nf4(some, kernels).codes, quantize_nf4(some).codes)


def test_nested_scales_are_the_same(kernels: Kernels) -> None:
    weight = normal(64, 640)
    want, got = quantize_nf4(weight, double_quant=True), encode_nf4(weight, kernels, double_quant=True)
    assert isinstance(got.absmax, NestedScales)
    assert torch.equal(got.scales(), want.scales())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [64, 32])
def test_int8_has_the_same_codes(
    shape: tuple[int, int], dtype: torch.dtype, group: int, kernels: Kernels
) -> None:
    weight = weights(shape, dtype)
    want, got = quantize_int8(weight, group), encode_int8(weight, kernels, group)
    assert got.group == want.group == group
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scales, want.scales)


@pytest.mark.parametrize("encode", [encode_nf4, encode_int8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(
    encode: Callable[[torch.Tensor, Kernels], object], value: float, kernels: Kernels
) -> None:
    weight = normal(33, 100)
    weight[32, 99] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(weight, kernels)
