"""The last hidden states of a prompt, as its chunks bring them, become one vector. Imports no torch."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from manylora.server.engine.request import Pooling, Vector

Doubles: TypeAlias = npt.NDArray[np.float64]


class PooledStates:
    """What has been pooled of one prompt.

    The sum is kept in float64 and added to one token after the other, so it has the same bits whatever the chunks were;
    and of a hundred thousand states of float32 it loses nothing that would be seen in their mean.
    """

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._sum: Doubles | None = None
        self._count = 0
        self._last: Vector | None = None

    def add(self, states: Vector) -> None:
        """Take in the states of a chunk's tokens, [n, hidden], n ≥ 1; of the last token they are all that counts."""
        if self._pooling is Pooling.LAST:
            self._last = states[-1].copy()
            return
        total = np.zeros(states.shape[1]) if self._sum is None else self._sum
        for state in states:
            total += state
        self._sum = total
        self._count += len(states)

    def result(self) -> Vector:
        """Return the vector, float32 [hidden]."""
        if self._last is not None:
            return self._last
        assert self._sum is not None, "a prompt has a token"
        return (self._sum / self._count).astype(np.float32)
