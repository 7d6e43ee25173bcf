"""New rows are what they are called, whatever the shapes, and alpha grows so that the scale doesn't."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.training.rank.slices import alpha_at, kaiming_rows, orthogonal_rows


@settings(deadline=None)  # LAPACK's first call is slow
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 16))
def test_orthogonal_rows_are_orthogonal_while_there_is_room(count: int, rank: int, width: int) -> None:
    generator = torch.Generator().manual_seed(count)
    old = torch.randn(rank, width, generator=generator)
    rows = orthogonal_rows(count, old, generator)
    assert rows.shape == (count, width)
    free = rows[: max(0, min(count, width - rank))]
    torch.testing.assert_close(free @ old.T, torch.zeros(len(free), rank), rtol=0, atol=1e-4)
    torch.testing.assert_close(free @ free.T, torch.eye(len(free)) / 3, rtol=0, atol=1e-4)


def test_fresh_rows_are_drawn_as_peft_draws_them() -> None:
    rows = kaiming_rows(64, torch.zeros(8, 400), torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(400, 64, bias=False)
    torch.nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    assert rows.abs().max() <= 1 / 20
    assert rows.std().item() == pytest.approx(layer.weight.std().item(), rel=0.02)


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.1, 1000), st.booleans())
def test_alpha_keeps_the_scale(rank: int, more: int, alpha: float, rslora: bool) -> None:
    def scale(a: float, r: int) -> float:
        return a / math.sqrt(r) if rslora else a / r

    grown = alpha_at(rank + more, rank, alpha, rslora=rslora)
    assert scale(grown, rank + more) == pytest.approx(scale(alpha, rank), rel=1e-12)
