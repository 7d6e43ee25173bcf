"""A short random walk over adapters, mixtures, requests and faults; the long one is the bar `mixtures`."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from manylora.loadtest.bars.mixture_walk import Diverged, Walk
from manylora.loadtest.bars.walk_house import House, opened
from manylora.server.catalog_types import ResolvedModel


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_nothing_diverges_from_the_model(seed: int, tmp_path: Path) -> None:
    async with opened(tmp_path) as house:
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
    catalog = house.catalog
    resolve = catalog.resolve

    def wrong(request):  # type: ignore[no-untyped-def]
        parts = request.adapters
        if len(parts) > 1:
            turned = [weight for _, weight in parts[1:]] + [parts[0][1]]
            parts = tuple((adapter_id, weight) for (adapter_id, _), weight in zip(parts, turned, strict=True))
        return submit(replace(request, adapters=parts))

    def same(model: str) -> ResolvedModel:
        return resolve(model)

    monkeypatch.setattr(house.engine, "submit", wrong)
    monkeypatch.setattr(catalog, "resolve", same)
