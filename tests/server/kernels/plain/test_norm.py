"""RMSNorm of the plain backend: the reference's values, and nothing that overflowed passes for an answer."""

import pytest
import torch

from manylora.server.kernels import reference
from manylora.server.kernels.plain.backend import rms_norm

EPS = 1e-6


def test_values_are_the_references() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_a_row_whose_square_overflows_is_not_finite_and_its_neighbour_is_what_it_is_alone(
    dtype: torch.dtype, value: float
) -> None:
    """1 / √∞ is 0: zeros would go on to logits that are all the same."""
    x, weight = torch.randn(2, 64).to(dtype), torch.ones(64, dtype=dtype)
    alone = rms_norm(x[1:], weight, EPS)
    x[0, 3] = value
    found = rms_norm(x, weight, EPS)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], alone)
