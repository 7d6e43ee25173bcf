"""NF4 equals bitsandbytes bit for bit: codes, absmax, nested absmax and dequantised values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.nf4 import NestedScales, Nf4Tensor, quantize_nf4, stack_rows
from tests.quant.bnb import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (128, 192), (96, 704), (5, 64), (7, 10), (3, 3), (1, 64), (300, 1024))


def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    values[0] = 0.0  # blocks of zeros
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blocksize", [64, 128])
def test_codes_and_absmax_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, blocksize: int
) -> None:
    weight = matrix(shape, dtype)
    ours = quantize_nf4(weight, blocksize)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
    assert torch.equal(ours.codes, codes.view(-1))
    assert isinstance(ours.absmax, torch.Tensor)
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 2 == 0])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantised_values_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    weight = matrix(shape, dtype, seed=1)
    ours = quantize_nf4(weight, double_quant=double_quant)
    theirs = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant
    )
    assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(*theirs))


def test_double_quantisation_is_that_of_bitsandbytes() -> None:
    weight = matrix((640, 512), torch.float32, seed=2)
    ours = quantize_nf4(weight, double_quant=True).absmax
    assert isinstance(ours, NestedScales)
    _, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.equal(ours.codes, state.absmax)
    assert torch.equal(ours.absmax, state.state2.absmax)
    assert torch.equal(ours.code_map, state.state2.code)
    assert torch.equal(ours.offset, state.offset)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 10_000), st.floats(1e-6, 1e3))
def test_any_shape_and_scale(rows: int, columns: int, seed: int, scale: float) -> None:
    weight = matrix((rows, columns), torch.float32, seed) * scale
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    ours = quantize_nf4(weight)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.scales(), state.absmax)


def test_memory_is_four_and_a_half_bits_a_weight() -> None:
    weight = matrix((1024, 1024), torch.float32)
    assert quantize_nf4(weight).bits_per_weight == 4.5
    assert quantize_nf4(weight, double_quant=True).bits_per_weight == pytest.approx(4.127, abs=0.01)


def test_stacked_rows_dequantise_as_their_parts() -> None:
    parts = [quantize_nf4(matrix((rows, 64), torch.float32, rows), double_quant=rows > 8) for rows in (8, 16)]
    stacked = stack_rows(parts)
    expected = torch.cat([part.dequantize(torch.float32) for part in parts])
    assert isinstance(stacked, Nf4Tensor)
    assert torch.equal(stacked.dequantize(torch.float32), expected)


def test_non_finite_weights_are_refused() -> None:
    weight = matrix((8, 64), torch.float32)
    weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_nf4(weight)
