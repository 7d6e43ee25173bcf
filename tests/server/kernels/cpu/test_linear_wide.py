"""Products of packed matrices by activations of bfloat16: near the plain ones, and a row's bits are its own."""

import pytest
import torch

from manylora.quant.nf4 import quantize_nf4
from manylora.server.kernels.cpu.abi import ACTIVATIONS_BF16
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.pack import pack
from tests.server.kernels.cpu.conftest import RUNS
from tests.server.kernels.cpu.matrices import FORMATS, normal
from tests.server.kernels.cpu.products import expected, product, weights_of
from tests.server.kernels.cpu.test_linear import ROWS, activations, opened, packed

NAMES = [name for name in FORMATS if not name.startswith("bf16")]
BF16_STEP = 2.0**-8
"""The largest relative error of a weight and an activation that are both rounded to bfloat16."""


@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_that_of_the_packed_weights(name: str, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    x = activations(matrix.shape[1])
    want, size = expected(kernels, matrix, x, ACTIVATIONS_BF16)
    assert ((product(kernels, matrix, x, ACTIVATIONS_BF16) - want).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_gets_the_same_bits_whoever_comes_with_it(name: str, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    x = activations(matrix.shape[1])
    whole = product(kernels, matrix, x, ACTIVATIONS_BF16)
    for rows in (*range(1, 15), 31, 32, 63, 64, 65, 69):
        for first in {0, 1, ROWS - rows}:
            some = product(kernels, matrix, x[first : first + rows], ACTIVATIONS_BF16)
            assert torch.equal(some, whole[first : first + rows]), (rows, first)


@pytest.mark.parametrize("name", ["nf4-64x896", "gptq8-by-128"])
def test_a_row_gets_the_same_bits_on_one_thread_and_on_many(name: str, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    x = activations(matrix.shape[1])
    want = product(kernels, matrix, x, ACTIVATIONS_BF16)
    for threads in (1, 3):
        assert torch.equal(product(opened(kernels.level, threads), matrix, x, ACTIVATIONS_BF16), want)


@pytest.mark.skipif(len(RUNS) < 2, reason="this processor runs one level or none")
@pytest.mark.parametrize("name", NAMES)
def test_levels_differ_by_the_rounding_of_sums_alone(name: str) -> None:
    every = [opened(level, 2) for level in RUNS]
    matrix = packed(name, every[0])
    x = activations(matrix.shape[1])
    _, size = expected(every[0], matrix, x, ACTIVATIONS_BF16)
    first, *others = (product(kernels, matrix, x, ACTIVATIONS_BF16) for kernels in every)
    assert all(((other - first).abs() <= 4e-6 * size).all() for other in others)


@pytest.mark.parametrize("name", ["nf4-64x896", "awq", "int8-50x100", "gptq4-shuffled"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_felt_in_its_own_row_alone(name: str, value: float, kernels: Kernels) -> None:
    matrix = packed(name, kernels)
    for rows in (9, 3):
        x = activations(matrix.shape[1], rows)
        clean = product(kernels, matrix, x, ACTIVATIONS_BF16)
        x[1, matrix.shape[1] // 2] = value
        y = product(kernels, matrix, x, ACTIVATIONS_BF16)
        assert not y[1].isfinite().any()
        others = [row for row in range(rows) if row != 1]
        assert torch.equal(y[others], clean[others])


def test_rows_of_nothing_and_of_almost_nothing_give_the_bias(kernels: Kernels) -> None:
    matrix = packed("nf4-33x128", kernels)
    x = torch.zeros(3, 128)
    x[1] = 1e-42
    assert matrix.bias is not None
    assert torch.equal(product(kernels, matrix, x, ACTIVATIONS_BF16), matrix.bias.expand(3, -1))


def test_nf4_s_values_are_finer_than_bytes(kernels: Kernels) -> None:
    source = quantize_nf4(normal(64, 896))
    matrix = pack(source, None, kernels)
    want = source.dequantize(torch.float32)
    torch.testing.assert_close(weights_of(kernels, matrix, ACTIVATIONS_BF16), want, rtol=BF16_STEP, atol=0)
    x = activations(896)
    off = [(product(kernels, matrix, x, form) - x @ want.T).norm() for form in (0, ACTIVATIONS_BF16)]
    assert off[1] * 3 < off[0]
