"""NF4 equals bitsandbytes bit for bit: codes, absmax, nested absmax and dequantised values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.quant.nf4 import CHUNK, NestedScales, Nf4Tensor, quantize_nf4, stack_rows
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


# Of each type: the smallest normal number, and one so large that the sum of 516 such absmax is just finite.
EXTREMES = {
    torch.float32: (1.2e-38, 1e35),
    torch.bfloat16: (1.2e-38, 1e35),
    torch.float16: (6.2e-5, 6.5e4),
}
# Not a multiple of 64; one block; 255, 256, 257 and 300 of them, so that nested blocks are full, just full and not.
EDGE_SHAPES = ((3, 2), (7, 10), (1, 64), (255, 64), (256, 64), (257, 64), (100, 192), (33, 1000))


def edge_cases(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    least, most = EXTREMES[dtype]
    spread = torch.logspace(-6, 0, normal.numel()).view(shape)
    cases = {
        "zeros": torch.zeros(shape),
        "one value": torch.full(shape, -0.3),
        "denormals": normal * least * 0.01,
        "about the smallest": normal * least * 2,
        "huge": (normal * most).clamp(-most, most),
        "six decades": normal * spread,
        "mostly zeros": normal * (normal > 1.5),
    }
    return {name: values.to(dtype) for name, values in cases.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EDGE_SHAPES)
def test_extreme_values_are_coded_as_by_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for name, weight in edge_cases(shape, dtype).items():
        for double_quant in (False, True):
            ours = quantize_nf4(weight, double_quant=double_quant)
            codes, state = functional.quantize_4bit(
                weight, quant_type="nf4", blocksize=64, compress_statistics=double_quant
            )
            assert torch.equal(ours.codes, codes.view(-1)), name
            if isinstance(ours.absmax, NestedScales):
                assert torch.equal(ours.absmax.codes, state.absmax), name
                assert torch.equal(ours.absmax.absmax, state.state2.absmax), name
                assert torch.equal(ours.absmax.offset, state.offset), name
            else:
                assert torch.equal(ours.absmax, state.absmax), name
            values, theirs = ours.dequantize(dtype), functional.dequantize_4bit(codes, state)
            if dtype is torch.bfloat16:
                # The processor's bfloat16 conversion, which bitsandbytes uses for some shapes, makes denormals zero.
                values, theirs = (
                    torch.where(each.abs() < EXTREMES[dtype][0], 0, each) for each in (values, theirs)
                )
            assert torch.equal(values, theirs), name


def test_a_large_matrix_is_coded_in_chunks_alike() -> None:
    weight = matrix((700, 1000), torch.bfloat16, seed=5)
    ours = quantize_nf4(weight)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert weight.numel() > 2 * CHUNK
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(ours.scales(), state.absmax)


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
    weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_nf4(weight, double_quant=True)
