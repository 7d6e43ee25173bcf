"""Which group a vector is nearest to, whatever all have in common and whatever each prompt is about."""

import numpy as np
import pytest

from manylora.server.catalog.nearest import MOST_SPREAD, SHRINKAGE, Board, Group
from manylora.server.catalog.prompt_vectors import Floats

HIDDEN = 64
RNG = np.random.default_rng(7)
COMMON = 40.0 * RNG.normal(size=HIDDEN)
"""What all states of a model have in common, far larger than what tells them apart."""
WAYS = {name: RNG.normal(size=HIDDEN) for name in ("sql", "json", "base")}


ABOUT = 2.0 * RNG.normal(size=(2, HIDDEN))
"""Directions in which prompts of every kind differ, and say nothing of whose they are."""


def of(way: str, count: int) -> Floats:
    about = RNG.normal(size=(count, 2)) @ ABOUT
    rows = COMMON + WAYS[way] + about + 0.2 * RNG.normal(size=(count, HIDDEN))
    return rows.astype(np.float32)


def board(**counts: int) -> Board:
    return Board([Group(name, of(name, count)) for name, count in counts.items()])


@pytest.mark.parametrize("counts", [(8, 8, 8), (2, 4, 16), (32, 3, 3)])
def test_prompts_are_nearest_to_the_examples_of_their_kind(counts: tuple[int, int, int]) -> None:
    ranking = board(**dict(zip(WAYS, counts, strict=True)))
    for way in WAYS:
        for vector in of(way, 20):
            nearest, *others = ranking.rank(vector)
            assert nearest.name == way
            assert all(nearest.score > other.score for other in others)


def test_one_example_of_each_is_enough_where_prompts_do_not_differ() -> None:
    groups = [Group(name, (COMMON + way)[np.newaxis].astype(np.float32)) for name, way in WAYS.items()]
    ranking = Board(groups)
    for group in groups:
        nearest = ranking.rank(group.vectors[0].astype(np.float32))[0]
        assert nearest.name == group.name
        assert nearest.score == pytest.approx(1.0, abs=1e-6)


def test_of_many_examples_a_part_tells_how_they_are_spread() -> None:
    ranking = board(sql=MOST_SPREAD, json=MOST_SPREAD // 2, base=3)
    asked = [way for way in WAYS for _ in range(5)]
    assert [ranking.rank(vector)[0].name for way in WAYS for vector in of(way, 5)] == asked


def test_of_equals_the_one_that_came_first_is_first() -> None:
    same = of("sql", 3)
    twins = Board([Group("one", same), Group("two", same), Group("base", of("base", 3))])
    assert [near.name for near in twins.rank(same[0])][:2] == ["one", "two"]


def test_a_vector_of_zeros_is_near_to_something_and_breaks_nothing() -> None:
    scores = [near.score for near in board(sql=2, base=2).rank(np.zeros(HIDDEN, dtype=np.float32))]
    assert all(-1.001 <= score <= 1.001 for score in scores)


@pytest.mark.parametrize("counts", [(5, 3, 4), (MOST_SPREAD, MOST_SPREAD // 2, 3)])
def test_scores_are_cosines_where_the_shrunk_covariance_is_a_sphere(counts: tuple[int, int, int]) -> None:
    """Held against the whole matrix, (S + λI)^-½, of every so many-th example where there are very many."""
    groups = [Group(name, of(name, count)) for name, count in zip(WAYS, counts, strict=True)]
    means = np.stack([group.vectors.mean(axis=0, dtype=np.float64) for group in groups])
    around = np.concatenate([group.vectors - mean for group, mean in zip(groups, means, strict=True)])
    around = around[:: -(-len(around) // MOST_SPREAD)]
    covariance = around.T @ around / len(around)
    values, ways = np.linalg.eigh(covariance + SHRINKAGE * np.trace(covariance) / HIDDEN * np.eye(HIDDEN))
    stretch = ways / np.sqrt(values) @ ways.T
    vector = of("json", 1)[0]
    away = (vector - means.mean(axis=0)) @ stretch
    found = {near.name: near.score for near in Board(groups).rank(vector)}
    for group, mean in zip(groups, (means - means.mean(axis=0)) @ stretch, strict=True):
        cosine = mean @ away / np.linalg.norm(mean) / np.linalg.norm(away)
        assert found[group.name] == pytest.approx(cosine, abs=1e-6)
