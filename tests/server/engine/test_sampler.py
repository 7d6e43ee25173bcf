"""Sampler: the right distribution, the same bits in any company, faults and logprobs."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.server.engine.request import SamplingParams
from manylora.server.engine.sampler import SampledToken, SampleFault, Sampler, SamplerState, SamplingRow

V = 300  # two whole blocks and a part of one


def _row(params: SamplingParams, choice: int = 0, prompt: tuple[int, ...] = ()) -> SamplingRow:
    return SamplingRow(params, SamplerState(params, prompt, choice))


def _tokens(results: list[SampledToken | SampleFault]) -> list[int]:
    ids = []
    for result in results:
        assert isinstance(result, SampledToken)
        ids.append(result.token_id)
    return ids


def _reference(logits: Tensor, p: SamplingParams) -> Tensor:
    """Probabilities [V] by sorting: top_k, then top_p over what is left, then min_p."""
    probs = torch.softmax(logits.double() / p.temperature, -1)
    order = torch.sort(probs, descending=True, stable=True).indices
    if p.top_k:
        probs[order[p.top_k :]] = 0
        probs /= probs.sum()
    kept = probs[order]
    above = torch.stack([kept[kept > value].sum() for value in kept])
    keep = (above < p.top_p) if p.top_p < 1 else torch.ones_like(above, dtype=torch.bool)
    keep[0] = True
    keep &= kept >= p.min_p * kept[0]
    probs[order[~keep]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_p=0.9),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.05),
        SamplingParams(top_p=0.0),
        SamplingParams(top_k=10),
        SamplingParams(top_k=1),
        SamplingParams(top_k=40, top_p=0.7, temperature=1.5),
        SamplingParams(min_p=0.2),
        SamplingParams(min_p=0.1, top_p=0.6),
        SamplingParams(top_k=20, top_p=0.9, min_p=0.3),
        SamplingParams(top_k=V - 1, top_p=0.8),
        SamplingParams(top_k=V + 5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_distribution_is_the_reference_s(params: SamplingParams, spread: float) -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * spread
    expected = _reference(logits, params)
    sampler, draws, batch = Sampler(V, "cpu"), 20_000, 500
    counts: Counter[int] = Counter()
    for step in range(draws // batch):
        rows = [_row(replace(params, seed=step * batch + i)) for i in range(batch)]
        counts.update(_tokens(sampler.sample(logits.repeat(batch, 1), rows)))
    assert all(expected[token] > 0 for token in counts), "a token outside the filters was drawn"
    statistic, degrees = 0.0, -1
    rare_expected = rare_seen = 0.0
    for token, probability in enumerate(expected.tolist()):
        mean = probability * draws
        if mean < 8:
            rare_expected, rare_seen = rare_expected + mean, rare_seen + counts[token]
            continue
        statistic += (counts[token] - mean) ** 2 / mean
        degrees += 1
    if rare_expected >= 8:
        statistic += (rare_seen - rare_expected) ** 2 / rare_expected
        degrees += 1
    # Seeds are fixed, so this either holds for good or it does not: five standard deviations.
    assert statistic <= degrees + 5 * math.sqrt(2 * max(degrees, 1))


_KINDS = (
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(seed=1, logprobs=0),
    SamplingParams(seed=2, top_p=0.9, temperature=0.7),
    SamplingParams(seed=3, top_p=0.3),
    SamplingParams(seed=4, top_k=50, top_p=0.9, logprobs=20),
    SamplingParams(seed=5, min_p=0.3, repetition_penalty=1.3),
    SamplingParams(seed=6, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={3: 5.0}, logprobs=2),
    SamplingParams(seed=7, min_tokens=3, stop_token_ids=(1, 2)),
)


@pytest.mark.parametrize("vocabulary", [151_936, 50_257, 100])
def test_a_row_alone_and_in_any_batch_gets_the_same_bits(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(33, vocabulary, generator=generator) * torch.linspace(0.5, 4, 33).unsqueeze(1)

    def row(i: int) -> SamplingRow:
        made = _row(replace(_KINDS[i % len(_KINDS)]), i, (1, 2, 3))
        for token in (4, 5, 4):
            made.state.append(token)
        return made

    sampler = Sampler(vocabulary, "cpu")
    alone = [sampler.sample(logits[i : i + 1].clone(), [row(i)])[0] for i in range(33)]
    for size in range(2, 34):
        start = 33 - size
        batch = sampler.sample(logits[start:].clone(), [row(i) for i in range(start, 33)])
        assert batch == alone[start:]


def test_the_same_seed_gives_the_same_choice_and_choices_differ() -> None:
    logits = torch.zeros(6, V)
    params = SamplingParams(seed=42)
    tokens = _tokens(Sampler(V, "cpu").sample(logits, [_row(params, i % 3) for i in range(6)]))
    assert tokens[:3] == tokens[3:]
    assert len(set(tokens)) > 1


def test_positions_draw_different_numbers_and_unseeded_states_differ() -> None:
    state = SamplerState(SamplingParams(seed=-1), ())
    first = state.uniform(0)
    state.append(5)
    assert first != state.uniform(0) != state.uniform(1)
    assert SamplerState(SamplingParams(), ()).uniform(0) != SamplerState(SamplingParams(), ()).uniform(0)


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, V)
    logits[:, [290, 130, 7]] = 1.0
    rows = [_row(SamplingParams(temperature=0)), _row(SamplingParams(top_k=1))]
    assert _tokens(Sampler(V, "cpu").sample(logits, rows)) == [7, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [*_KINDS, SamplingParams(top_k=5)], ids=repr)
def test_a_row_that_is_not_finite_fails_alone(params: SamplingParams, bad: float) -> None:
    sound = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    reported = replace(params, logprobs=3, seed=1)
    alone = Sampler(V, "cpu").sample(sound.clone(), [_row(reported) for _ in range(3)])
    for where in (slice(200, 201), slice(0, V)):
        logits = sound.clone()
        logits[1, where] = bad
        results = Sampler(V, "cpu").sample(logits, [_row(reported) for _ in range(3)])
        assert [isinstance(result, SampleFault) for result in results] == [False, True, False]
        assert (results[0], results[2]) == (alone[0], alone[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_mask_hides_is_not_reported_either(bad: float) -> None:
    """A token that may not be chosen yet has no finite logit: no distribution can be told."""
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    logits[0, 200] = bad
    params = SamplingParams(temperature=0, min_tokens=1, stop_token_ids=(200,), logprobs=2)
    first, second = Sampler(V, "cpu").sample(logits, [_row(params), _row(params)])
    assert isinstance(first, SampleFault)
    assert isinstance(second, SampledToken)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=3)])
def test_a_row_with_nothing_possible_fails_and_masked_tokens_do_not(params: SamplingParams) -> None:
    logits = torch.full((2, V), -math.inf)
    logits[1, 17] = 0.5
    first, second = Sampler(V, "cpu").sample(logits, [_row(params), _row(params)])
    assert isinstance(first, SampleFault)
    assert second == SampledToken(17)


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2)) * 3
    before = logits.clone()
    params = SamplingParams(seed=1, temperature=0.3, logit_bias={11: 50.0}, logprobs=4, presence_penalty=1.0)
    (result,) = Sampler(V, "cpu").sample(logits, [_row(params)])
    assert isinstance(result, SampledToken)
    assert result.logprobs is not None
    raw = torch.log_softmax(before[0].double(), -1)
    assert result.token_id == result.logprobs.token_id == 11
    assert result.logprobs.logprob == pytest.approx(raw[11].item(), abs=1e-5)
    best = raw.topk(4)
    assert [i for i, _ in result.logprobs.top] == best.indices.tolist()
    assert [x for _, x in result.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert torch.equal(logits, before), "the logits come back as they were"


def test_prompt_logprobs() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(4))
    reports = Sampler(V, "cpu").prompt_logprobs(logits, [0, 299, 5, 6, 7], 2)
    assert not isinstance(reports, SampleFault)
    raw = torch.log_softmax(logits.double(), -1)
    for i, report in enumerate(reports.tokens()):
        assert report.logprob == pytest.approx(raw[i, report.token_id].item(), abs=1e-5)
        assert [token for token, _ in report.top] == raw[i].topk(2).indices.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_prompt_logprobs_that_are_not_finite_are_a_fault(bad: float) -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(4))
    logits[1] = bad
    assert isinstance(Sampler(V, "cpu").prompt_logprobs(logits, [0, 1, 2], 2), SampleFault)


def test_tiny_temperature_is_greedy_and_shapes_are_checked() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(5)) * 10
    sampler = Sampler(V, "cpu")
    assert _tokens(sampler.sample(logits, [_row(SamplingParams(temperature=1e-30))])) == [
        int(logits.argmax())
    ]
    assert sampler.sample(torch.zeros(0, V), []) == []
    with pytest.raises(ValueError, match="expected"):
        sampler.sample(torch.zeros(1, V + 1), [_row(SamplingParams())])


def test_a_mask_leaves_what_it_allows_and_changes_no_logprobs() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(5))
    before, allowed = logits.clone(), (7, 130, 299)
    mask = np.zeros(11, dtype=np.int32)  # a word more than the vocabulary has
    for token in allowed:
        mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    params = SamplingParams(seed=3, logprobs=2, logit_bias={130: 4.0, 8: 100.0}, top_k=20)
    kinds = (params, replace(params, temperature=0.0), replace(params, top_k=0, top_p=0.9), params)
    rows = [replace(_row(kind), mask=mask if number < 3 else None) for number, kind in enumerate(kinds)]
    results = Sampler(V, "cpu").sample(logits, rows)
    assert torch.equal(logits, before), "the logits were not put back"
    tokens = _tokens(results)
    assert set(tokens[:3]) <= set(allowed)
    assert tokens[3] == 8
    raw = torch.log_softmax(before.double(), -1)
    for number, result in enumerate(results):
        assert isinstance(result, SampledToken)
        assert result.logprobs is not None
        assert result.logprobs.logprob == pytest.approx(float(raw[number, result.token_id]), abs=1e-5)
        assert result.logprobs.top[0][0] == int(raw[number].argmax())
