"""8-bit weights: codes to the nearest, groups to themselves, and what can't be quantised."""

import pytest
import torch

from manylora.quant.int8 import GROUP, LARGEST, quantize_int8
from manylora.server.kernels.plain import PlainBackend

CPU = torch.device("cpu")


@pytest.mark.parametrize("wide", [GROUP, GROUP + 1, 3 * GROUP - 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [GROUP, 32])
def test_a_weight_is_off_by_at_most_half_a_step_of_its_own_group(
    wide: int, dtype: torch.dtype, size: int
) -> None:
    weight = torch.randn(33, wide, generator=torch.Generator().manual_seed(wide)).to(dtype)
    # Groups of very different size: none may take another's scale.
    weight[:, : wide // 2] *= 1000
    held = quantize_int8(weight, size)
    error = (held.dequantize(torch.float32) - weight.float()).abs()
    for first in range(0, wide, size):
        group = slice(first, first + size)
        half = weight[:, group].float().abs().amax(1, keepdim=True) / LARGEST / 2
        assert (error[:, group] <= half * 1.001).all()
    assert held.shape == (33, wide)
    assert held.codes.abs().max() == LARGEST


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 2 * GROUP)
    weight[:, 0] = 1
    assert torch.equal(quantize_int8(weight).dequantize(torch.float32), weight)


def test_a_group_of_almost_nothing_becomes_zero() -> None:
    weight = torch.full((1, GROUP), 1e-40)
    assert torch.equal(quantize_int8(weight).codes, torch.zeros(1, GROUP, dtype=torch.int8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(3, GROUP)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize_int8(weight)


def test_plain_torch_multiplies_by_what_was_quantised() -> None:
    weight = torch.randn(24, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    held = quantize_int8(weight)
    x = torch.randn(16, 2 * GROUP, generator=torch.Generator().manual_seed(1))
    found = PlainBackend(CPU, torch.float32).prepare([held], None)(x)
    torch.testing.assert_close(found, x @ held.dequantize(torch.float32).T)
    assert (found - x @ weight.T).norm() / (x @ weight.T).norm() < 0.01
