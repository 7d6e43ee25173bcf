"""A prompt as a vector: what the base made of its last tokens, and which tokens there are. Arithmetic only.

The states of the last tokens have seen everything before them, and say what is to come; how a prompt is worded they
say less well, the less the larger the part that differs from prompt to prompt (a table, a text to work on). So the
tokens themselves are told beside them, as a sketch: each adds 1 or -1 at a place that its id alone decides
(Weinberger et al. 2009, 0902.2206).
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
LAST = 24
"""Tokens at a prompt's end whose states count, and that are told of once more."""
SHARES = (1.0, 0.5**0.5, 0.5**0.5)
"""Lengths of a vector's parts: what a base of any size understands weighs as much as the words."""
PLACES = 512
"""Numbers of a sketch."""


def width(hidden: int) -> int:
    """Return how many numbers a vector has."""
    return hidden + 2 * PLACES


def prompt_vector(states: Floats, turn: Sequence[int]) -> Floats:
    """Return the vector of a prompt, float32 [width]: its states' mean and two sketches, which weigh as much together.

    ``states`` is the mean of those of its last tokens, [hidden]; ``turn`` the tokens of what was asked last.
    """
    parts = states, _sketch(turn), _sketch(turn[-LAST:])
    return np.concatenate(
        [np.float32(share) * _unit(part) for share, part in zip(SHARES, parts, strict=True)]
    )


def _sketch(ids: Sequence[int]) -> Floats:
    found = np.zeros(PLACES, dtype=np.float32)
    mixed = _mixed(np.array(ids, dtype=np.uint64))
    signs = np.where(mixed >> np.uint64(63), 1.0, -1.0).astype(np.float32)
    np.add.at(found, (mixed % np.uint64(PLACES)).astype(np.intp), signs)
    return found


def _mixed(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return numbers that look drawn, one for each id: the finaliser of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        each = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        each = (each ^ (each >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        each = (each ^ (each >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return each ^ (each >> np.uint64(31))


def _unit(vector: Floats) -> Floats:
    wide = vector.astype(np.float64)
    length = float(np.linalg.norm(wide))
    return (wide / length if length else wide).astype(np.float32)
