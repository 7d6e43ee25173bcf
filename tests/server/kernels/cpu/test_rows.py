"""Rows of 16 bits that were never packed: near the exact product, and each token's bits its own."""

import pytest
import torch
from torch import Tensor

from manylora.server.kernels.cpu.library import Kernels


def multiplied(kernels: Kernels, x: Tensor, rows: Tensor) -> Tensor:
    y = torch.full((len(x), len(rows)), 7.0)
    sizes = len(rows), rows.shape[1], x.data_ptr(), len(x), y.data_ptr()
    kernels.call("multiply_rows", rows.data_ptr(), *sizes)
    return y


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
@pytest.mark.parametrize(("count", "wide"), [(1, 5), (33, 64), (130, 201)])
def test_it_is_the_product_and_a_tokens_bits_are_its_own(
    kernels: Kernels, tokens: int, count: int, wide: int
) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, wide, generator=generator).to(torch.bfloat16)
    x = torch.randn(tokens, wide, generator=generator)
    found = multiplied(kernels, x, rows)
    torch.testing.assert_close(found.double(), x.double() @ rows.double().T, rtol=1e-5, atol=1e-4)
    for token in range(tokens):
        assert torch.equal(multiplied(kernels, x[token : token + 1].clone(), rows)[0], found[token])
