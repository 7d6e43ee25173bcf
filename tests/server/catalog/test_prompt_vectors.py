"""A prompt's vector: its states and its tokens, each in a part of its own length, the same in every process."""

import numpy as np
import pytest

from manylora.server.catalog.prompt_vectors import LAST, PLACES, SHARES, prompt_vector, width

HIDDEN = 8
STATES = np.arange(1, HIDDEN + 1, dtype=np.float32) * 1e18


def parts(ids: list[int], states: np.ndarray = STATES) -> list[np.ndarray]:
    vector = prompt_vector(states, ids)
    assert vector.shape == (width(HIDDEN),)
    return [vector[:HIDDEN], vector[HIDDEN : HIDDEN + PLACES], vector[HIDDEN + PLACES :]]


def test_each_part_has_its_length_however_large_it_was() -> None:
    assert [float(np.linalg.norm(part)) for part in parts([5, 6, 7])] == pytest.approx(SHARES, rel=1e-6)


def test_nothing_has_no_length() -> None:
    assert [float(np.linalg.norm(part)) for part in parts([], np.zeros(HIDDEN, dtype=np.float32))] == [
        0,
        0,
        0,
    ]


def test_the_sketches_are_of_all_tokens_and_of_the_last_in_whatever_order() -> None:
    ids = list(range(100, 100 + 3 * LAST))
    _, whole, last = parts(ids)
    assert (parts(ids[::-1])[1] == whole).all()
    assert (parts(ids[-LAST:])[1] == last).all()
    assert (parts([*range(900, 950), *ids[-LAST:]])[2] == last).all()
    assert not (whole == last).all()


def test_a_token_has_its_place_and_sign_in_every_process() -> None:
    places = [
        (int(np.abs(sketch).argmax()), float(np.sign(sketch.sum())))
        for sketch in (parts([i])[1] for i in range(4))
    ]
    assert places == [(431, 1.0), (500, -1.0), (335, -1.0), (492, 1.0)]


def test_different_tokens_are_nearly_at_right_angles() -> None:
    one, other = parts(list(range(20)))[1], parts(list(range(1000, 1020)))[1]
    assert abs(float(one @ other)) < 0.2
