"""Scaling and shifting outputs in plain torch against a plain loop over spans, and that nobody else is touched."""

import pytest
import torch

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.server.kernels import reference
from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.plain import outputs
from manylora.server.kernels.plain.outputs import build_outputs
from manylora.server.kernels.step import LoraSpan, RankRange

CPU = torch.device("cpu")
OUT, ROWS = 40, 20
PLAIN, ONE, TWO, SHIFTED, ELSEWHERE = (
    {"q_proj": RankRange(0, 3)},
    {"q_proj": RankRange(3, 5)},
    {"q_proj": RankRange(9, 3)},
    {"q_proj": RankRange(13, 1)},
    {"o_proj": RankRange(3, 5)},
)
SPANS = [
    LoraSpan(0, 7, ((ONE, 1.0),)),
    LoraSpan(7, 1, ()),
    LoraSpan(8, 2, ((PLAIN, 0.5), (TWO, -0.7), (ONE, 2.0))),
    LoraSpan(10, 1, ((TWO, 1.0),)),
    LoraSpan(11, 3, ((PLAIN, 1.0),)),
    LoraSpan(14, 2, ((ELSEWHERE, 1.0),)),
    LoraSpan(16, 1, ((ONE, 0.3), (SHIFTED, 0.3))),
    LoraSpan(17, 1, ((SHIFTED, 1.0),)),
]


@pytest.fixture
def rows() -> OutputRows:
    found = OutputRows(("q_proj", "o_proj"))
    pair = LoraPair(torch.ones(1, 1), torch.ones(1, 1))
    one = {"x.q_proj": torch.ones(1)}
    found.written(ONE, AdapterWeights({"x.q_proj": pair}, one))
    found.written(TWO, AdapterWeights({"x.q_proj": pair}, one, one))
    found.written(SHIFTED, AdapterWeights({}, {}, one))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("most", [256, 2])
def test_it_is_what_the_reference_gives_and_others_keep_every_bit(
    rows: OutputRows, dtype: torch.dtype, biased: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "MOST_TOKENS", most)
    torch.manual_seed(0)
    y, b = torch.randn(18, OUT).to(dtype), torch.randn(ROWS, OUT).to(dtype)
    bias = torch.randn(OUT).to(dtype) if biased else None
    y[7], y[11], y[14] = torch.inf, torch.nan, -0.0
    ours = y.clone()
    built = build_outputs(SPANS, rows, CPU)
    assert built.keys() == {"q_proj"}
    for block in built["q_proj"]:
        block.apply(b, bias, ours)
    theirs = reference.outputs(y, bias, b, "q_proj", SPANS, rows)
    touched = [*range(7), 8, 9, 10, 16, 17]
    near = 1e-6 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(ours.float()[touched], theirs[touched], rtol=near, atol=near)
    others = [token for token in range(18) if token not in touched]
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(ours.view(bits)[others], y.view(bits)[others])
    assert (ours[touched] != y[touched]).any(dim=1).all()


def test_a_step_without_any_has_none(rows: OutputRows) -> None:
    assert build_outputs([LoraSpan(0, 3, ((PLAIN, 1.0),)), LoraSpan(3, 1, ())], rows, CPU) == {}
