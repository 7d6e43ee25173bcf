"""Judging draws in one transfer, as on a GPU, and row by row, as on a CPU, gives the same answers."""

import math

import torch

from manylora.server.engine import draw
from manylora.server.engine.draw import block_sums, draw_above, judge


def test_draws_are_judged_alike_in_one_transfer() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(4 * torch.randn(40, 1000, generator=generator), dim=-1)
    probs[7] = torch.nan
    rows = [number for number in range(40) if number % 3]
    top_p = [(0.1, 0.5, 0.9, math.inf)[number % 4] for number in rows]
    index = torch.tensor(rows)
    u = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    drawn = draw_above(probs, index, block_sums(probs)[index], torch.zeros(len(rows)), u)
    one, other = judge(probs, rows, drawn, top_p), draw._judge_at_once(probs, rows, drawn, top_p)
    assert one.ids == other.ids
    assert one.finite == other.finite
    assert not one.finite[rows.index(7)]
    assert one.rejected == other.rejected
    assert 5 < len(one.rejected) < 25
    assert torch.equal(one.sums, other.sums)
