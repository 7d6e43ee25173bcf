"""Mixtures by the decoder and the engine: sixteen in one batch, against peft's cat and against each alone."""

from pathlib import Path

import pytest
import torch

from manylora.loadtest.checks.mixture_exactness import RANKS, TARGETS, check_mixtures, kinds
from manylora.server.model.loader import Quantization
from tests.server.model.models import save_model
from tests.server.model.steps import Stream, all_logits, load, place, random_adapter, step


def test_sixteen_mixtures_are_those_of_peft_and_no_bit_of_them_depends_on_the_batch(tmp_path: Path) -> None:
    found = list(check_mixtures(tmp_path, torch.device("cpu")))
    assert len(found) == 5
    assert all(outcome.passed for outcome in found), [each for each in found if not each.passed]


def test_the_sixteen_are_what_they_are_said_to_be() -> None:
    mixtures = [parts for parts in kinds() if len(parts) > 1]
    assert len(set(mixtures)) == 16
    assert {len(parts) for parts in mixtures} == set(range(2, 9))
    for parts in mixtures:
        weights = [weight for _, weight in parts]
        assert max(weights) > 1
        assert min(weights) < -1
        assert torch.tensor(weights).tolist() == weights
        assert len({number for number, _ in parts}) == len(parts)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_mixtures_keep_their_bits_in_company_in_bfloat16(quantization: Quantization, tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model = load(tmp_path, torch.bfloat16, quantization, streams=len(kinds()))
    config = model.decoder.config
    adapters = [
        random_adapter(config, rank, number, TARGETS[number % len(TARGETS)], outputs=number % 3 == 0)
        for number, rank in enumerate(RANKS)
    ]
    placed = place(model, adapters)
    uses = [tuple((placed[part], weight) for part, weight in parts) for parts in kinds()]
    text = [(7 * place + 3) % 90 for place in range(20)]
    mixed, alone = ([Stream(number, list(text), use) for number, use in enumerate(uses)] for _ in range(2))
    step(model, [(stream, 19) for stream in mixed])
    step(model, [(stream, 1) for stream in mixed])
    for stream in alone:
        step(model, [(stream, 20)])
    for one, other in zip(mixed, alone, strict=True):
        assert torch.equal(all_logits(one), all_logits(other))
    ends = [all_logits(stream)[-1] for stream in alone]
    assert all(not torch.equal(a, b) for number, a in enumerate(ends) for b in ends[:number])
