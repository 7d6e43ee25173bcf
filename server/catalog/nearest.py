"""Which of several adapters a prompt is nearest to, by the vectors of their example prompts. Arithmetic only.

Prompts of one adapter differ too, in what they are about; in these directions a difference says little. So space is
stretched until the examples of each group are spread alike in all directions, as far as so few tell (the within-group
covariance, shrunk towards a sphere): Fisher's discriminant. There a prompt is as near to a group as the angle between
them is small, seen from the middle of all groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from manylora.server.catalog.prompt_vectors import Floats

Doubles: TypeAlias = npt.NDArray[np.float64]
SHRINKAGE = 1.0
"""How much of a sphere is added to the spread that was found, as a share of its mean."""
MOST_SPREAD = 512
"""Examples that the spread is found from, at most: more take seconds."""


@dataclass(frozen=True, slots=True)
class Group:
    """What has examples: an adapter, or the base."""

    name: str
    vectors: npt.NDArray[np.floating]
    """[examples, width]; at least one."""


@dataclass(frozen=True, slots=True)
class Near:
    """How near a group is: a cosine, from -1 to 1."""

    name: str
    score: float


class Board:
    """Groups that are compared with each other; made once for those that are candidates together."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._names = [group.name for group in groups]
        means = np.stack([group.vectors.mean(axis=0, dtype=np.float64) for group in groups])
        self._middle = means.mean(axis=0)
        around = np.concatenate(
            [group.vectors - mean for group, mean in zip(groups, means, strict=True)], dtype=np.float64
        )
        self._stretch = _Stretch(_some(around))
        self._means = _unit(self._stretch.of(means - self._middle))

    def rank(self, vector: Floats) -> tuple[Near, ...]:
        """Return all groups, the nearest to a prompt's ``vector`` [width] first; of equals the one that came first."""
        away = _unit(self._stretch.of(vector.astype(np.float64)[np.newaxis] - self._middle))[0]
        scores = (self._means @ away).tolist()
        found = (Near(name, score) for name, score in zip(self._names, scores, strict=True))
        return tuple(sorted(found, key=lambda near: -near.score))


class _Stretch:
    """Multiplies by (S + λI)^-½, where S is the covariance of ``around`` [n, width]: by n directions, not width²."""

    def __init__(self, around: Doubles) -> None:
        _, spread, self._directions = np.linalg.svd(around / np.sqrt(len(around)), full_matrices=False)
        variances = spread**2
        total = float(variances.sum())
        sphere = SHRINKAGE * total / around.shape[1] if total else 1.0
        self._along = 1 / np.sqrt(variances + sphere)
        self._across = 1 / np.sqrt(sphere)

    def of(self, rows: Doubles) -> Doubles:
        """Return rows [m, width] stretched."""
        along = rows @ self._directions.T
        found: Doubles = rows * self._across + (along * (self._along - self._across)) @ self._directions
        return found


def _some(rows: Doubles) -> Doubles:
    """Return the rows, or as many as may be, spread evenly over them all."""
    step = -(-len(rows) // MOST_SPREAD)
    return rows[::step]


def _unit(rows: Doubles) -> Doubles:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Doubles = rows / np.where(lengths > 0, lengths, 1.0)
    return found
