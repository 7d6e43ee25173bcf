"""A short random walk over adapters, mixtures, requests and faults; the long one is the bar `mixtures`."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from manylora.loadtest.checks.bars.material import level_of
from manylora.loadtest.checks.bars.mixture_walk import Diverged, Walk
from manylora.loadtest.checks.bars.walk_house import House, opened
from manylora.server.engine.output_stream import OutputStream
from manylora.server.engine.request import GenerationRequest
from manylora.server.kernels.choose import AUTO, PLAIN, sound_kernels
from manylora.server.kernels.cpu.library import Unavailable


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("seed", "kernels"), [(1, PLAIN), (3, AUTO)])
async def test_nothing_diverges_from_the_model(seed: int, kernels: str, tmp_path: Path) -> None:
    if kernels == AUTO and isinstance(sound_kernels(), Unavailable):
        pytest.skip("no native CPU kernels here")
    async with opened(tmp_path, level_of(kernels)) as house:
        walk = Walk(house, random.Random(seed))
        await walk.go(300)
        assert house.faults.count > 0
    for what in (
        "whole answers",
        "left",
        "failed",
        "replaced",
        "deleted",
        "mixtures made",
        "mixtures deleted",
    ):
        assert walk.counts[what] > 0, what


@pytest.mark.timeout(300)
async def test_a_walk_notices_another_mixtures_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as house:
        _answer_with_other_weights(house, monkeypatch)
        with pytest.raises(Diverged):
            await Walk(house, random.Random(1)).go(300)


def _answer_with_other_weights(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a mixture's weights be those of its neighbour, as a wrong key of a cache would."""
    submit = house.engine.submit

    def wrong(request: GenerationRequest) -> OutputStream:
        ids, weights = [i for i, _ in request.adapters], [weight for _, weight in request.adapters]
        turned = tuple(zip(ids, weights[1:] + weights[:1], strict=True))
        return submit(replace(request, adapters=turned))

    monkeypatch.setattr(house.engine, "submit", wrong)
