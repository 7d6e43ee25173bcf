"""One number that is not finite is found wherever it is, in every type."""

import pytest
import torch

from manylora.adapters.finite import all_finite

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 17, 256, 4095])
def test_what_is_not_finite_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    tensor = torch.randn(16, 256).to(dtype)
    assert all_finite(tensor)
    tensor.view(-1)[place] = bad
    assert not all_finite(tensor)
    assert not all_finite(tensor.T)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0, 5))
    assert all_finite(torch.tensor([torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16))
