"""Native sampling against the engine's Sampler: the same token for the same seed."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.server.engine.request import SamplingParams
from manylora.server.engine.sampler import SampledToken, Sampler, SamplerState, SamplingRow
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.sampling import MORE_DRAWS, NOT_FINITE

DRAWS = 40
COLDEST = 1e-20
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1e-30},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "top_p": 0.5, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.9, "top_k": 50},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.6},
    {"temperature": 1.5, "top_k": 300, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 10**6},
)


def native(kernels: Kernels, logits: Tensor, rows: Sequence[SamplingRow], draws: int = DRAWS) -> list[int]:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    params = [row.params for row in rows]
    ids = torch.full((len(rows),), -9, dtype=torch.int32)
    columns = (
        column([1.0 / max(p.temperature, COLDEST) if p.temperature > 0 else 0.0 for p in params]),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        column([p.top_p for p in params]),
        column([p.min_p for p in params]),
        torch.tensor([[row.state.uniform(n) for n in range(draws)] for row in rows], dtype=torch.float64),
    )
    pointers = [each.data_ptr() for each in columns]
    kernels.call("sample", logits.data_ptr(), *logits.shape, *pointers, draws, ids.data_ptr())
    return [int(i) for i in ids]


def make_rows(count: int, first_seed: int = 0) -> list[SamplingRow]:
    rows = []
    for number in range(count):
        params = SamplingParams(**KINDS[number % len(KINDS)], seed=first_seed + number)
        rows.append(SamplingRow(params, SamplerState(params, ())))
    return rows


def wanted(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    found = Sampler(logits.shape[1], "cpu").sample(logits.clone(), rows)
    return [token.token_id if isinstance(token, SampledToken) else NOT_FINITE for token in found]


def differing(found: Sequence[int], others: Sequence[int]) -> list[int]:
    """The rows whose tokens differ. (What pytest makes of two long lists that differ takes minutes.)"""
    return [row for row, (one, other) in enumerate(zip(found, others, strict=True)) if one != other]


@pytest.mark.parametrize("vocab", [1000, 128, 3, 151936])
@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_a_seed_draws_the_token_that_the_sampler_draws(kernels: Kernels, vocab: int, spread: float) -> None:
    count = 2 * len(KINDS) if vocab > 10_000 else 20 * len(KINDS)
    torch.manual_seed(vocab)
    logits, rows = torch.randn(count, vocab) * spread, make_rows(count)
    assert not differing(native(kernels, logits, rows), wanted(logits, rows))


def test_ties_go_as_the_sampler_has_them_go(kernels: Kernels) -> None:
    """Logits of a few values only: whole groups are on the border of each of the bounds."""
    torch.manual_seed(0)
    rows = make_rows(20 * len(KINDS))
    for levels in (1, 2, 5):
        logits = torch.randint(levels, (len(rows), 500)).float()
        assert not differing(native(kernels, logits, rows), wanted(logits, rows))


def test_what_is_not_finite_is_said_and_what_is_masked_is_not_chosen(kernels: Kernels) -> None:
    rows = make_rows(4 * len(KINDS))
    logits = torch.randn(len(rows), 1000)
    clean = native(kernels, logits, rows)
    for bad in (math.nan, math.inf):
        for place in (0, 517, 999):
            broken = logits.clone()
            broken[::2, place] = bad
            found = native(kernels, broken, rows)
            assert found[::2] == [NOT_FINITE] * (len(rows) // 2)
            assert found[1::2] == clean[1::2]
    masked = logits.clone()
    masked[:, 100:] = -math.inf
    found = native(kernels, masked, rows)
    assert not differing(found, wanted(masked, rows))
    assert all(0 <= token < 100 for token in found)
    nothing = torch.full_like(logits, -math.inf)
    assert native(kernels, nothing, rows) == [NOT_FINITE] * len(rows)


def test_a_row_draws_the_same_alone(kernels: Kernels) -> None:
    rows = make_rows(3 * len(KINDS))
    logits = torch.randn(len(rows), 1001) * 2
    together = native(kernels, logits, rows)
    alone = [native(kernels, logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    assert not differing(alone, together)


def test_a_sampler_with_native_draws_gives_what_one_without_does(kernels: Kernels) -> None:
    """Edits, reports and faults included; some rows need more numbers than they are given at first."""
    kinds: list[dict[str, Any]] = [
        {},
        {"logit_bias": {7: 5.0, 9: -100.0}},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3, "logprobs": 3},
        {"top_p": 0.02},
        {"logprobs": 0},
    ]
    rows = []
    for number in range(6 * len(KINDS)):
        params = SamplingParams(**{**KINDS[number % len(KINDS)], **kinds[number % len(kinds)]}, seed=number)
        state = SamplerState(params, (3, 5, 8))
        for token in (7, 9, 9, 11):
            state.append(token)
        rows.append(SamplingRow(params, state))
    logits = torch.randn(len(rows), 1000, generator=torch.Generator().manual_seed(0))
    logits[::9, 4] = math.nan
    backend = CpuBackend(kernels, torch.float32)
    theirs = Sampler(1000, "cpu").sample(logits.clone(), rows)
    given = logits.clone()
    assert Sampler(1000, "cpu", backend.draw).sample(given, rows) == theirs
    assert torch.equal(given.nan_to_num(9.0), logits.nan_to_num(9.0))
    more = [row for row, kind in enumerate(kinds * len(KINDS)) if "top_p" in kind]
    assert MORE_DRAWS in native(kernels, logits[more], [rows[i] for i in more], draws=1)


def test_a_row_that_needs_more_numbers_says_so(kernels: Kernels) -> None:
    params = [SamplingParams(temperature=1.0, top_p=0.01, seed=seed) for seed in range(20)]
    rows = [SamplingRow(p, SamplerState(p, ())) for p in params]
    logits = torch.randn(20, 1000)
    few, enough = native(kernels, logits, rows, draws=1), native(kernels, logits, rows)
    assert MORE_DRAWS in few
    assert MORE_DRAWS not in enough
    assert all(one in (MORE_DRAWS, all_) for one, all_ in zip(few, enough, strict=True))
