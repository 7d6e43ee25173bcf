"""Native RMSNorm and gated activation against torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.reference import rms_norm, silu_gate

SIZES = (1, 7, 16, 33, 64, 100, 896, 1001)
EPS = 1e-6


def norm(kernels: Kernels, x: Tensor, weight: Tensor) -> Tensor:
    y = torch.empty_like(x)
    kernels.call("rms_norm_rows", x.data_ptr(), weight.data_ptr(), EPS, *x.shape, y.data_ptr())
    return y


def gated(kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(up)
    kernels.call("silu_mul_rows", gate.data_ptr(), up.data_ptr(), *up.shape, y.data_ptr())
    return y


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_normalised_as_by_the_reference(kernels: Kernels, size: int) -> None:
    torch.manual_seed(size)
    x, weight = torch.randn(5, size) * torch.tensor([[1e-8], [1e-3], [1.0], [30.0], [1e6]]), torch.randn(size)
    y = norm(kernels, x, weight)
    torch.testing.assert_close(y, rms_norm(x, weight, EPS), rtol=3e-6, atol=1e-12)
    for row in range(5):
        assert torch.equal(norm(kernels, x[row : row + 1].clone(), weight), y[row : row + 1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2e19])
def test_a_row_whose_squares_overflow_is_nan_throughout(kernels: Kernels, size: int, bad: float) -> None:
    x, weight = torch.ones(3, size), torch.ones(size)
    x[1, size - 1] = bad
    y = norm(kernels, x, weight)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_gates_are_those_of_the_reference(kernels: Kernels, size: int) -> None:
    torch.manual_seed(size)
    gate, up = torch.randn(4, size) * 20, torch.randn(4, size)
    expected = silu_gate(torch.cat((gate, up), dim=1))
    torch.testing.assert_close(gated(kernels, gate, up), expected, rtol=1e-6, atol=1e-12)


def test_what_is_not_finite_stays_so_through_the_gate(kernels: Kernels) -> None:
    gate = torch.tensor([[math.inf, -math.inf, math.nan, 3e38, -3e38, -1000.0, 0.0, -90.0, 1.0, -2.0]])
    up = torch.ones_like(gate)
    torch.testing.assert_close(gated(kernels, gate, up), F.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-36)
    up = torch.tensor([[1.0, math.inf, -math.inf, math.nan, 0.0]])
    ones = torch.ones_like(up)
    torch.testing.assert_close(gated(kernels, ones, up), F.silu(ones) * up, equal_nan=True)
