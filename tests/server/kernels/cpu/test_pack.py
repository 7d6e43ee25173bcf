"""Matrices in the native layout: what they weigh is what they weighed, up to what the layout rounds."""

from dataclasses import replace

import pytest
import torch

from manylora.quant.dense import DenseTensor
from manylora.quant.int8 import quantize_int8
from manylora.quant.nf4 import NF4_CODE, Nf4Tensor, quantize_nf4
from manylora.server.kernels.backend import WeightSource
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.pack import NF4_FACTOR, NF4_TABLE, CannotPack, can_pack, pack
from tests.server.kernels.cpu.matrices import FORMATS, gptq, normal
from tests.server.kernels.cpu.products import weights_of

F16_STEP = 2.0**-11
"""The largest relative error of rounding to f16."""


@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_are_the_source_s(name: str, kernels: Kernels) -> None:
    source = FORMATS[name]
    assert can_pack(source) is None
    matrix = pack(source, None, kernels)
    want, got = source.dequantize(torch.float32), weights_of(kernels, matrix)
    if name.startswith(("gptq", "awq")):  # scales are f16 there, and codes are kept
        assert torch.equal(got, want)
    elif name.startswith("bf16"):
        assert torch.equal(got, want.bfloat16().float())
    elif name.startswith(("int8", "split")):
        torch.testing.assert_close(got, want, rtol=F16_STEP, atol=0)
    else:
        half_a_step = 0.5 / NF4_FACTOR * want.abs().max()
        torch.testing.assert_close(got, want, rtol=F16_STEP, atol=float(half_a_step))


def test_nf4_s_values_are_rounded_to_the_nearest_bytes() -> None:
    assert tuple((NF4_CODE * NF4_FACTOR).round().int().tolist()) == NF4_TABLE


def test_four_bits_and_what_belongs_to_them_are_all_that_is_held(kernels: Kernels) -> None:
    matrix = pack(quantize_nf4(normal(64, 896)), None, kernels)
    assert matrix.nbytes == 64 * 896 // 2 + 64 * 14 * (2 + 2) + 16
    assert matrix.codes.data_ptr() % 64 == 0


def test_scales_far_apart_and_far_from_one_keep_their_digits(kernels: Kernels) -> None:
    absmax = torch.tensor([2.0**-60, 2.0**-75, 2.0**-88, 0.0]) * 1.001
    codes = torch.full((128,), 0xFF, dtype=torch.uint8)  # the largest value everywhere
    source = Nf4Tensor(codes, absmax, (1, 256))
    got = weights_of(kernels, pack(source, None, kernels))
    torch.testing.assert_close(
        got, source.dequantize(torch.float32) * (123 / NF4_FACTOR), rtol=F16_STEP, atol=0
    )


def test_scales_too_small_beside_the_largest_become_nothing(kernels: Kernels) -> None:
    source = Nf4Tensor(torch.full((64,), 0xFF, dtype=torch.uint8), torch.tensor([1.0, 2.0**-45]), (1, 128))
    got = weights_of(kernels, pack(source, None, kernels))
    assert got[0, 64:].eq(0).all()
    assert got[0, :64].gt(0.99).all()


def test_a_symmetric_matrix_holds_no_zero_points(kernels: Kernels) -> None:
    assert pack(FORMATS["awq-symmetric"], None, kernels).zeros is None
    assert pack(FORMATS["awq"], None, kernels).zeros is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value: float, kernels: Kernels) -> None:
    source = Nf4Tensor(torch.zeros(32, dtype=torch.uint8), torch.tensor([value]), (1, 64))
    with pytest.raises(ValueError, match="not finite"):
        pack(source, None, kernels)


def _uneven_groups() -> WeightSource:
    whole = gptq(8, 64, 4, 32)
    return replace(whole, g_idx=(torch.arange(64) >= 40).int())


REFUSED = {
    "run over": quantize_nf4(normal(4, 96)),
    "multiple of 32": _uneven_groups(),
    "no multiple": quantize_nf4(normal(4, 48), 16),
    "3 bits": replace(gptq(8, 64, 4, 32), bits=3),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_native_form_is_refused_with_the_reason(words: str, kernels: Kernels) -> None:
    assert words in (can_pack(REFUSED[words]) or "")
    with pytest.raises(CannotPack, match=words):
        pack(REFUSED[words], None, kernels)


def test_a_bias_is_kept_in_float32(kernels: Kernels) -> None:
    bias = torch.randn(33).bfloat16()
    matrix = pack(quantize_int8(normal(33, 64)), bias, kernels)
    assert matrix.bias is not None
    assert torch.equal(matrix.bias, bias.float())
    assert pack(DenseTensor(normal(33, 64)), None, kernels).bias is None
