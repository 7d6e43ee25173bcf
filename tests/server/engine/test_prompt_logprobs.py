"""Log probabilities of a prompt, told chunk by chunk."""

import gc

import numpy as np
import pytest

from manylora.server.engine.prompt_logprobs import LogprobRows, PromptLogprobs
from manylora.server.engine.request import TokenLogprobs


def rows(first: int, count: int, top: int = 2) -> LogprobRows:
    ids = np.arange(first, first + count)
    best = np.stack([ids + 10 * k for k in range(top)], axis=1) if top else np.empty((count, 0), np.int64)
    return LogprobRows(ids, -ids / 8, best, -best / 8)


def expected(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -token / 8, ((token, -token / 8), (token + 10, -(token + 10) / 8)))


@pytest.fixture
def told() -> PromptLogprobs:
    found = PromptLogprobs()
    for first, count in ((1, 3), (4, 0), (4, 5)):
        found.add(rows(first, count))
    return found


def test_chunks_follow_each_other_behind_a_first_token_that_nothing_predicts(told: PromptLogprobs) -> None:
    assert len(told) == 9
    assert list(told) == [None, *(expected(token) for token in range(1, 9))]


def test_each_place_is_what_iterating_gives(told: PromptLogprobs) -> None:
    whole = list(told)
    assert [told[place] for place in range(9)] == whole
    assert [told[place] for place in range(-9, 0)] == whole
    assert told[2:7:2] == whole[2:7:2]
    with pytest.raises(IndexError):
        told[9]


def test_a_prompt_of_one_token_tells_nothing() -> None:
    assert list(PromptLogprobs()) == [None]


def test_without_alternatives_there_are_none() -> None:
    found = PromptLogprobs()
    found.add(rows(1, 2, top=0))
    assert found[1] == TokenLogprobs(1, -1 / 8)


def test_many_are_few_objects_for_the_garbage_collector() -> None:
    gc.collect()
    before = len(gc.get_objects())
    found = PromptLogprobs()
    for chunk in range(20):
        found.add(rows(1 + 1000 * chunk, 1000))
    assert len(gc.get_objects()) - before < 200
    assert len(found) == 20_001
