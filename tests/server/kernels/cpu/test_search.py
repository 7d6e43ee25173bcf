"""The best token by a head's high halves: what its logits say, to the bit."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.loadtest.material.decode_steps import decode_step
from manylora.server.kernels.check import fault
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.encode import encode_int8
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.pack import SPLIT_MOST, PackedMatrix, SplitTensor, pack
from manylora.server.kernels.cpu.run import CpuStep
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.sampling import UNTOLD, SamplingColumns
from tests.server.kernels.cpu.products import product
from tests.server.kernels.cpu.test_backend import native
from tests.server.model.models import save_model

NOTHING = -1


def head(kernels: Kernels, weights: Tensor, bias: Tensor | None = None) -> PackedMatrix:
    """Return it in halves of 8 bits."""
    return pack(SplitTensor(encode_int8(weights, kernels, 32, SPLIT_MOST)), bias, kernels)


def found(kernels: Kernels, matrix: PackedMatrix, x: Tensor, places: list[int] | None = None) -> list[int]:
    """Return the tokens of x [rows, in] that the search finds."""
    structure, count = matrix.structure(), len(x)
    whose = torch.tensor(list(range(count)) if places is None else places, dtype=torch.int32)
    ids = torch.full((count,), 77, dtype=torch.int32)
    arguments = (x.data_ptr(), count, whose.data_ptr(), ids.data_ptr())
    assert kernels.call("search", ctypes.addressof(structure), *arguments) == 0
    return [int(each) for each in ids]


def noise(rows: int, wide: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, wide, generator=torch.Generator().manual_seed(seed))


def like_a_model(out: int, wide: int) -> Tensor:
    """Weights with outlier channels, of which most groups' others are next to nothing."""
    weights = noise(out, wide, 2)
    weights[:, ::32] *= 40
    return weights


@pytest.mark.parametrize("make", [noise, like_a_model])
@pytest.mark.parametrize(("out", "wide"), [(4001, 192), (300, 100), (7, 64)])
def test_the_token_is_that_of_the_largest_logit(
    kernels: Kernels, out: int, wide: int, make: Callable[[int, int], Tensor]
) -> None:
    matrix = head(kernels, make(out, wide), noise(1, out, 5)[0])
    at_once = 3 if kernels.level == "avx2" else 6
    for rows in range(1, at_once + 1):
        for seed in range(20):
            x = noise(rows, wide, seed) * 10.0 ** (seed % 5 - 2)
            assert found(kernels, matrix, x) == product(kernels, matrix, x).argmax(-1).tolist(), (rows, seed)


def test_a_state_that_is_a_tokens_own_row_gives_that_token(kernels: Kernels) -> None:
    """What is left out is independent of the state, though the state is not of the weights."""
    weights = like_a_model(2000, 128)
    matrix = head(kernels, weights)
    for token in range(0, 2000, 97):
        x = weights[token : token + 1].clone()
        x[:, ::32] = 0
        assert found(kernels, matrix, x) == product(kernels, matrix, x).argmax(-1).tolist()


def test_of_equal_logits_the_lowest_id_is_taken(kernels: Kernels) -> None:
    weights = noise(1000, 64)
    x = noise(1, 64, 9)
    best = int(product(kernels, head(kernels, weights), x).argmax())
    for other in (0, 999):
        weights[other] = weights[best]
    assert found(kernels, head(kernels, weights), x) == [0]
    assert found(kernels, head(kernels, torch.zeros(1000, 64)), x) == [0]


def test_more_rows_than_a_tile_has_are_refused(kernels: Kernels) -> None:
    x, ids = noise(7, 64), torch.zeros(7, dtype=torch.int32)
    structure = head(kernels, noise(50, 64)).structure()
    arguments = (x.data_ptr(), 7, ids.data_ptr(), ids.data_ptr())
    assert kernels.call("search", ctypes.addressof(structure), *arguments) == 1


def test_a_state_of_zeros_gives_the_largest_bias(kernels: Kernels) -> None:
    bias = noise(1, 500, 4)[0]
    matrix = head(kernels, noise(500, 64), bias)
    assert found(kernels, matrix, torch.zeros(1, 64)) == [int(bias.argmax())]


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_has_no_token_and_costs_no_other_its_own(
    kernels: Kernels, strange: float
) -> None:
    matrix = head(kernels, noise(500, 64))
    x = noise(3, 64, 6)
    alone = found(kernels, matrix, x)
    x[1, 5] = strange
    assert found(kernels, matrix, x) == [alone[0], NOTHING, alone[2]]


def test_each_is_told_whose_token_it_asked_for(kernels: Kernels) -> None:
    matrix = head(kernels, noise(500, 64))
    x = noise(3, 64, 8)
    alone = found(kernels, matrix, x)
    assert found(kernels, matrix, x, [2, 0, 2]) == [alone[2], alone[0], alone[2]]


class Misled(CpuBackend):
    """Finds other tokens than its logits' best."""

    def collect(self, launched: CpuStep, wake: int = -1) -> StepOutput:
        output = super().collect(launched, wake)
        if output.sampled is None:
            return output
        return replace(output, sampled=replace(output.sampled, ids=output.sampled.ids + 1))


def test_a_level_that_finds_other_tokens_is_not_trusted(kernels: Kernels) -> None:
    assert fault(CpuBackend(kernels, torch.float32), 0.05) is None
    assert "best tokens" in (fault(Misled(kernels, torch.float32), 0.05) or "")


@pytest.mark.parametrize(
    "wanted",
    [
        {"told": np.array([UNTOLD, 0], np.int32)},
        {"inverse_temperature": np.array([0.0, 1.0])},
        {"masks": (None, np.full(1 << 10, -1, np.int32))},
    ],
)
def test_a_step_of_a_few_greedy_tokens_writes_no_logits_unless_they_are_wanted(
    kernels: Kernels, tmp_path: Path, wanted: dict[str, Any]
) -> None:
    save_model("qwen2-window", tmp_path)
    model = native(tmp_path, kernels)
    step = decode_step(model, 2, 9, [])
    whole = model.collect(model.launch(step, None)).logits.clone()
    few = model.collect(model.launch(step, SamplingColumns.greedy(2)))
    assert few.sampled is not None
    assert few.sampled.ids.tolist() == whole.argmax(-1).tolist()
    assert len(few.logits) == 0
    assert torch.equal(
        model.collect(model.launch(step, replace(SamplingColumns.greedy(2), **wanted))).logits, whole
    )
    some = replace(SamplingColumns.greedy(1), places=np.array([1], np.int32))
    assert torch.equal(model.collect(model.launch(step, some)).logits, whole), "of another row they are"


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_one_logit_that_is_not_finite_leaves_no_token(kernels: Kernels, strange: float) -> None:
    bias = torch.zeros(500)
    bias[321] = strange
    assert found(kernels, head(kernels, noise(500, 64), bias), noise(1, 64, 6)) == [NOTHING]
