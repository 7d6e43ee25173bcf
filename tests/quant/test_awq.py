"""AWQ's GEMM packing against a packer that goes number by number."""

import pytest
import torch

from manylora.quant.awq import AwqTensor, pack_awq
from tests.quant.packers import awq_tensors, random_codes


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_dequantised_values_are_the_formulas(group_size: int) -> None:
    codes = random_codes(256, 32, group_size, 4, sym=False, desc_act=False)
    ours = AwqTensor(**awq_tensors(codes))
    assert ours.shape == (32, 256)
    assert torch.equal(ours.dequantize(torch.float32), codes.weight())
    assert torch.equal(ours.dequantize(torch.bfloat16), codes.weight().bfloat16())


def test_packing_gives_the_same_words() -> None:
    codes = random_codes(64, 24, 16, 4, sym=False, desc_act=False)
    ours = pack_awq(torch.from_numpy(codes.codes), torch.from_numpy(codes.zeros), codes.scales)
    for name, words in awq_tensors(codes).items():
        assert torch.equal(getattr(ours, name), words), name


def test_a_known_word() -> None:
    """Columns 0…7 hold their own numbers: 7 5 3 1 6 4 2 0 from the highest bits down."""
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
    packed = pack_awq(codes, torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 8))
    assert int(packed.qweight[0, 0]) == 0x75316420
