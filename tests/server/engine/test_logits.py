"""edit_logits against the formulas written out densely."""

import math

import torch

from manylora.server.engine.logits import SamplerState, SamplingRow, edit_logits
from manylora.server.engine.request import SamplingParams

V = 50


def _row(params: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]) -> SamplingRow:
    state = SamplerState(params, prompt, 0, frozenset({49}))
    for token in output:
        state.append(token)
    return SamplingRow(params, state)


def test_penalties_bias_and_their_order() -> None:
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias={2: 1.0, 9: -100.0}
    )
    logits = torch.linspace(-2, 2, V).repeat(2, 1)
    before = logits.clone()
    edits = edit_logits(logits, [_row(SamplingParams(), (1,), (2,)), _row(params, (1, 48), (2, 48, 48))])
    expected = before[1].clone()
    for token, count in ((1, 0), (48, 2), (2, 1)):
        value = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
        expected[token] = value - 0.25 * count - 0.5 * (count > 0)
    expected[2] += 1
    expected[9] -= 100
    assert torch.equal(logits[0], before[0])
    torch.testing.assert_close(logits[1], expected)
    edits.restore(logits)
    assert torch.equal(logits, before)


def test_prompt_counts_for_the_repetition_penalty_only() -> None:
    logits = torch.ones(1, V)
    edit_logits(logits, [_row(SamplingParams(presence_penalty=1.0), (1, 2), ())])
    assert torch.equal(logits, torch.ones(1, V))


def test_min_tokens_masks_eos_and_stop_ids_until_then() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(3,))
    for output, masked in (((), True), ((1,), True), ((1, 1), False)):
        logits = torch.zeros(1, V)
        edit_logits(logits, [_row(params, (), output)])
        assert (logits[0, [3, 49]] == -math.inf).all().item() is masked
        assert logits[0, 4] == 0
    logits = torch.zeros(1, V)
    edit_logits(logits, [_row(SamplingParams(min_tokens=1, ignore_eos=True), (), ())])
    assert logits[0, 49] == 0


def test_counting_grows_past_its_first_room() -> None:
    row = _row(SamplingParams(frequency_penalty=1.0), (), tuple(range(1000)) * 2)
    assert row.state.seen_ids.tolist() == list(range(1000))
    assert set(row.state.seen_counts.tolist()) == {2.0}


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    logits = torch.zeros(2, V)
    edit_logits(logits, [_row(SamplingParams(logit_bias={V: 5.0, 1: 2.0}), (), ())] * 2)
    assert logits.sum() == 4
