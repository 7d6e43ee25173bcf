"""Chunks of quantised matrices are the rows of the whole, wherever they begin."""

import pytest
import torch

from manylora.adapters.export.nf4_layout import quantize_rows
from manylora.adapters.export.rows import CHUNK_WEIGHTS, DenseRows, PackedRows, chunks
from manylora.quant.nf4 import quantize_nf4


def noise(out: int, wide: int) -> torch.Tensor:
    """Rows of very different sizes: each block's scale is its own."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-2, 1, out)[torch.randperm(out, generator=generator)]
    return torch.randn(out, wide, generator=generator) * sizes[:, None]


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("wide", [64, 96, 640])
def test_any_rows_are_those_of_the_whole(wide: int, double_quant: bool) -> None:
    """Scales of scales count from the matrix's first block, not from the chunk's."""
    matrix = quantize_nf4(noise(800, wide), double_quant=double_quant)
    rows, whole = PackedRows(matrix), matrix.dequantize(torch.float32)
    for first, last in ((0, 800), (0, 64), (64, 128), (256, 512), (448, 800), (799, 800), (7, 9)):
        assert torch.equal(rows.rows(first, last), whole[first:last]), (first, last)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_a_matrix_of_several_chunks_is_quantised_as_one(double_quant: bool) -> None:
    weight = noise(2560, 2048)
    assert len(list(chunks(tuple(weight.shape)))) > 1
    assert weight.numel() > CHUNK_WEIGHTS
    made = quantize_rows(DenseRows(weight), torch.float32, double_quant=double_quant)
    whole = quantize_nf4(weight, double_quant=double_quant).dequantize(torch.float32)
    held = PackedRows(made)
    found = torch.cat([held.rows(first, last) for first, last in chunks(made.shape)])
    assert torch.equal(found, whole)
