"""What becomes of one matrix: factors that are added to it, rows that get another length, or a sum of such changes.

Everything twice: on the rows of the matrix themselves, and beside them as an adapter is served, which is what the
former is held against.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rows = slice | Tensor
"""Which rows of a matrix: a stretch of them, or their numbers (int64 [n])."""
Beside = Callable[[Tensor, Tensor, Rows], Tensor]
"""Makes of x Wᵀ what x W'ᵀ is, given those rows of W too: float32 [tokens, n], [n, in] and which they are."""


class Change(Protocol):
    """W' from W, in float32."""

    def on(self, rows: Tensor, at: Rows) -> Tensor:
        """Return rows of W' from the same ones of W, float32 [n, in]; ``at`` says which they are."""
        ...

    def beside(self, x: Tensor) -> Beside:
        """Return how inputs x, float32 [tokens, in], are answered with W as it is and the change beside it."""
        ...


@dataclass(frozen=True, slots=True)
class FactorChange:
    """W' = W + b a, and with a magnitude m (DoRA, 2402.09353) each row of that scaled to the length m."""

    a: Tensor
    """float32 [rank, in]"""
    b: Tensor
    """float32 [out, rank], the scale α/r or α/√r in it"""
    magnitude: Tensor | None = None
    """float32 [out]"""

    def on(self, rows: Tensor, at: Rows) -> Tensor:
        """Return rows of W'."""
        changed = torch.addmm(rows, self.b[at], self.a)
        if self.magnitude is not None:
            changed *= self._row_scale(self.magnitude, changed, at)[:, None]
        return changed

    def beside(self, x: Tensor) -> Beside:
        """Return how x is answered: the factors are applied to it rather than to W."""
        low = x @ self.a.T

        def answered(y: Tensor, rows: Tensor, at: Rows) -> Tensor:
            y = y + low @ self.b[at].T
            if self.magnitude is None:
                return y
            return y * self._row_scale(self.magnitude, rows + self.b[at] @ self.a, at)

        return answered

    @staticmethod
    def _row_scale(magnitude: Tensor, changed: Tensor, at: Rows) -> Tensor:
        """Return m / ‖row‖ of rows of W + b a."""
        scale: Tensor = magnitude[at] / torch.linalg.vector_norm(changed, dim=1)
        return scale


@dataclass(frozen=True, slots=True)
class SumOfChanges:
    """W' = W + Σ wᵢ (Wᵢ' − W): each part by itself on W, as a mixture is served."""

    parts: Sequence[tuple[float, Change]]

    def on(self, rows: Tensor, at: Rows) -> Tensor:
        """Return rows of W'."""
        return rows + sum(weight * (change.on(rows, at) - rows) for weight, change in self.parts)

    def beside(self, x: Tensor) -> Beside:
        """Return how x is answered with all parts beside W."""
        parts = [(weight, change.beside(x)) for weight, change in self.parts]

        def answered(y: Tensor, rows: Tensor, at: Rows) -> Tensor:
            return y + sum(weight * (answer(y, rows, at) - y) for weight, answer in parts)

        return answered
