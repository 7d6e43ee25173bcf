"""Products of packed matrices: near the plain ones, and a row's bits are its own."""

import pytest
import torch
from torch import Tensor

from manylora.quant.int8 import quantize_int8
from manylora.server.kernels.cpu.library import Kernels, open_kernels
from manylora.server.kernels.cpu.pack import PackedMatrix, pack
from tests.server.kernels.cpu.conftest import RUNS
from tests.server.kernels.cpu.matrices import FORMATS
from tests.server.kernels.cpu.products import expected, product, rows_of, weights_of

ROWS = 70


def activations(wide: int, rows: int = ROWS) -> Tensor:
    """Return rows with a few channels far larger than the rest, as real models have them."""
    generator = torch.Generator().manual_seed(wide)
    x = torch.randn(rows, wide, generator=generator) + 0.2
    x[:, :: max(wide // 3, 1)] *= 30
    return x


def opened(level: str, threads: int) -> Kernels:
    """Open a level that this processor runs."""
    kernels = open_kernels(level, threads)
    assert isinstance(kernels, Kernels)
    return kernels


def packed(name: str, kernels: Kernels) -> PackedMatrix:
    source = FORMATS[name]
    return pack(source, torch.randn(source.shape[0], generator=torch.Generator().manual_seed(5)), kernels)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_of_the_packed_weights(name: str, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    x = activations(matrix.shape[1])
    want, size = expected(kernels, matrix, x)
    assert ((product(kernels, matrix, x) - want).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_gets_the_same_bits_whoever_comes_with_it(name: str, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    x = activations(matrix.shape[1])
    whole = product(kernels, matrix, x)
    for rows in (*range(1, 15), 31, 32, 63, 64, 65, 69):
        for first in {0, 1, ROWS - rows}:
            some = product(kernels, matrix, x[first : first + rows])
            assert torch.equal(some, whole[first : first + rows]), (rows, first)


@pytest.mark.parametrize("name", ["nf4-64x896", "gptq8-by-128", "bf16-50x101"])
def test_a_row_gets_the_same_bits_on_one_thread_and_on_many(name: str, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    x = activations(matrix.shape[1])
    for threads in (1, 3):
        assert torch.equal(product(opened(kernels.level, threads), matrix, x), product(kernels, matrix, x))


@pytest.mark.skipif(len(RUNS) < 2, reason="this processor runs one level or none")
@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("bf16")])
def test_all_levels_give_the_same_bits(name: str) -> None:
    every = [opened(level, 2) for level in RUNS]
    matrix = packed(name, every[0])
    first, *others = (product(kernels, matrix, activations(matrix.shape[1])) for kernels in every)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_felt_in_its_own_row_alone(name: str, value: float, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    x = activations(matrix.shape[1], 9)
    clean = product(kernels, matrix, x)
    x[4, matrix.shape[1] // 2] = value
    y = product(kernels, matrix, x)
    assert not y[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(y[others], clean[others])


def test_rows_of_nothing_and_of_almost_nothing_give_the_bias(kernels: Kernels) -> None:
    matrix = packed("nf4-33x128", kernels)
    x = torch.zeros(3, 128)
    x[1] = 1e-42
    assert matrix.bias is not None
    assert torch.equal(product(kernels, matrix, x), matrix.bias.expand(3, -1))


def test_a_range_beyond_float32_is_told_from_a_number(kernels: Kernels) -> None:
    matrix = packed("nf4-33x128", kernels)
    x = torch.full((1, 128), 3e38)
    x[0, ::2] = -3e38
    assert product(kernels, matrix, x).isnan().all()


def test_groups_of_one_sign_use_all_of_their_range(kernels: Kernels) -> None:
    matrix = pack(quantize_int8(torch.eye(64)), None, kernels)
    for x in (torch.linspace(3, 4, 64)[None], torch.linspace(-4, -3, 64)[None]):
        want, _ = expected(kernels, matrix, x)
        y = product(kernels, matrix, x)
        assert ((y - want).abs() < 1e-5).all()
        assert ((y - x).abs() < 0.51 * 4 / 255 + 2e-3).all()


@pytest.mark.parametrize("name", ["int8-50x100", "bf16-50x101", "nf4-33x128", "gptq4-shuffled"])
def test_rows_of_an_embedding_are_looked_up_in_any_order(name: str, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    ids = torch.tensor([matrix.shape[0] - 1, 0, 7, 0, 32], dtype=torch.int32)
    assert torch.equal(rows_of(kernels, matrix, ids), weights_of(kernels, matrix)[ids.long()])
