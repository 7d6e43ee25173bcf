"""Native sampling against the engine's Sampler: the same token for the same seed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.server.engine.columns import columns_of
from manylora.server.engine.request import SamplingParams
from manylora.server.engine.sampler import SampledToken, SampleFault, Sampler, SamplerState, SamplingRow
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.sampling import NOT_FINITE

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


def native(kernels: Kernels, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    drawn = CpuBackend(kernels, torch.float32).draw(logits, columns_of(rows, logits.shape[1]))
    return [int(token) for token in drawn.ids]


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


@pytest.mark.parametrize("vocab", [3, 33, 1000, 151936])
def test_a_mask_hides_what_it_hides(kernels: Kernels, vocab: int) -> None:
    """Bits are the same as logits of -inf, whoever is beside it: one token, few, and almost all may be drawn."""
    rows, shares = make_rows(3 * len(KINDS)), (0.001, 0.3, 0.999)
    generator = np.random.default_rng(vocab)
    logits = torch.from_numpy(generator.standard_normal((len(rows), vocab), dtype=np.float32)) * 3
    allowed = np.zeros((len(rows), -(-vocab // 32) * 32 + 32), dtype=bool)
    for number, row in enumerate(allowed):
        row[:vocab] = generator.random(vocab) < shares[number % 3]
        row[generator.integers(vocab)] = True
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    masked = [replace(row, mask=None if n % 7 == 6 else words[n]) for n, row in enumerate(rows)]
    hidden = logits.clone()
    for number, each in enumerate(masked):
        if each.mask is not None:
            hidden[number][torch.from_numpy(~allowed[number, :vocab])] = -math.inf
    found = native(kernels, logits, masked)
    assert not differing(found, native(kernels, hidden, rows))
    assert not differing(found, wanted(logits, masked))
    assert all(
        allowed[number, token] for number, token in enumerate(found) if masked[number].mask is not None
    )


def test_a_row_draws_the_same_alone(kernels: Kernels) -> None:
    rows = make_rows(3 * len(KINDS))
    logits = torch.randn(len(rows), 1001) * 2
    together = native(kernels, logits, rows)
    alone = [native(kernels, logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    assert not differing(alone, together)


def test_a_sampler_with_native_draws_gives_what_one_without_does(kernels: Kernels) -> None:
    """Edits, reports and faults included."""
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
    ours = Sampler(1000, "cpu", backend).sample(given, rows)
    for one, other in zip(ours, theirs, strict=True):
        assert_alike(one, other)
    assert torch.equal(given.nan_to_num(9.0), logits.nan_to_num(9.0))


def assert_alike(one: SampledToken | SampleFault, other: SampledToken | SampleFault) -> None:
    if not isinstance(one, SampledToken) or not isinstance(other, SampledToken):
        assert one == other
        return
    assert one.token_id == other.token_id
    assert (one.logprobs is None) == (other.logprobs is None)
    if one.logprobs is not None and other.logprobs is not None:
        assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=2e-6)
        assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]
        values = [value for _, value in one.logprobs.top]
        assert values == pytest.approx([value for _, value in other.logprobs.top], abs=2e-6)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 12345678901234567890])
def test_numbers_are_drawn_from_the_seeds_of_the_states(kernels: Kernels, seed: int) -> None:
    """Of n equal logits a uniform number chooses the one that it falls on: so each bit of 20 is seen."""
    count = 1 << 20
    rows = []
    for choice in (0, 3):
        params = SamplingParams(temperature=1.0, seed=seed)
        state = SamplerState(params, (), choice)
        for _ in range(5 + choice):
            state.append(1)
        rows.append(SamplingRow(params, state))
    found = native(kernels, torch.zeros(2, count), rows)
    assert found == pytest.approx([row.state.uniform(0) * count for row in rows], abs=1.5)


def test_a_rows_log_probabilities_are_those_of_its_raw_logits_alone(kernels: Kernels) -> None:
    torch.manual_seed(3)
    logits = torch.randn(40, 1234) * 4
    logits[5] = 1.0
    logits[6, 7:] = -math.inf
    ids = logits.argsort(dim=1)[:, 600].int().numpy()
    places, told = np.arange(40, dtype=np.int32), np.array([-1, 0, 1, 5, 20] * 8, dtype=np.int32)
    backend = CpuBackend(kernels, torch.float32)
    found = backend.report(logits, places, ids, told)
    exact = logits.double().log_softmax(-1)
    for row, count in enumerate(told.tolist()):
        if count < 0:
            assert not found.top_logprobs[row].any()
            continue
        assert found.logprobs[row] == pytest.approx(float(exact[row, int(ids[row])]), abs=1e-6)
        best = sorted(range(1234), key=lambda i: (-float(logits[row, i]), i))[:count]
        assert found.top_ids[row, :count].tolist() == best
        assert found.top_logprobs[row, :count] == pytest.approx(exact[row, best].numpy(), abs=1e-6)
        alone = backend.report(logits, places[row : row + 1], ids[row : row + 1], told[row : row + 1])
        assert alone.logprobs[0] == found.logprobs[row]
        assert np.array_equal(alone.top_logprobs[0, :count], found.top_logprobs[row, :count])


def test_a_row_that_is_not_finite_is_told_of_by_no_number(kernels: Kernels) -> None:
    logits = torch.randn(3, 300)
    logits[1, 250] = math.nan
    ids, told = np.array([1, 2, 3], dtype=np.int32), np.full(3, 2, dtype=np.int32)
    found = CpuBackend(kernels, torch.float32).report(logits, np.arange(3, dtype=np.int32), ids, told)
    assert found.ids.tolist() == [1, NOT_FINITE, 3]
    sampler = Sampler(300, "cpu", CpuBackend(kernels, torch.float32))
    assert isinstance(sampler.prompt_logprobs(logits, [1, 2, 3], 2), SampleFault)
    assert not isinstance(sampler.prompt_logprobs(logits[:1], [1], 2), SampleFault)
