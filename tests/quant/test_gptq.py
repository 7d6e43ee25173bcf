"""GPTQ against a packer and a dequantiser that go number by number."""

from itertools import product

import numpy as np
import pytest
import torch

from manylora.quant.gptq import GptqTensor, pack_gptq, quantize_gptq_nearest
from tests.quant.packers import gptq_tensors, random_codes

OFFSETS = {"gptq": 1, "gptq_v2": 0}


def tensor(packed: dict[str, torch.Tensor], bits: int, offset: int) -> GptqTensor:
    return GptqTensor(packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"], bits, offset)


@pytest.mark.parametrize("version", OFFSETS)
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize(("bits", "sym", "desc_act"), list(product((4, 8), (True, False), (True, False))))
def test_dequantised_values_are_the_formulas(
    bits: int, sym: bool, desc_act: bool, group_size: int, version: str
) -> None:
    """Random codes use every value, so the top bit of a word is set, and stored zero points wrap below 0."""
    codes = random_codes(256, 16, group_size, bits, sym=sym, desc_act=desc_act)
    ours = tensor(gptq_tensors(codes, OFFSETS[version]), bits, OFFSETS[version])
    assert ours.shape == (16, 256)
    assert torch.equal(ours.dequantize(torch.float32), codes.weight())
    assert torch.equal(ours.dequantize(torch.bfloat16), codes.weight().bfloat16())


def test_the_zero_point_conventions_differ() -> None:
    codes = random_codes(32, 16, -1, 4, sym=True, desc_act=False)
    wrong = tensor(gptq_tensors(codes, 1), 4, 0)
    assert not torch.equal(wrong.dequantize(torch.float32), codes.weight())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_packing_gives_the_same_words(bits: int, offset: int) -> None:
    codes = random_codes(64, 24, 16, bits, sym=False, desc_act=True)
    expected = gptq_tensors(codes, offset)
    ours = pack_gptq(
        torch.from_numpy(codes.codes),
        torch.from_numpy(codes.zeros),
        codes.scales,
        torch.from_numpy(codes.g_idx),
        bits,
        offset,
    )
    for name, words in expected.items():
        assert torch.equal(getattr(ours, name), words), name


def test_a_last_group_may_be_short() -> None:
    codes = random_codes(80, 8, 32, 4, sym=False, desc_act=False)
    assert codes.scales.shape[0] == 3
    assert torch.equal(tensor(gptq_tensors(codes, 1), 4, 1).dequantize(torch.float32), codes.weight())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_nearest_rounding_is_within_half_a_step(bits: int, group_size: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).normal(0, 0.05, (24, 128)).astype(np.float32))
    ours = quantize_gptq_nearest(weight, group_size, bits)
    step = ours.scales.float().repeat_interleave(128 // ours.scales.shape[0], dim=0).T
    # The ends of a group's range may be off by a rounded zero point, too.
    assert ((ours.dequantize(torch.float32) - weight).abs() <= 1.01 * step).all()
