"""How a backend that samples itself is told of rows, and what it says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from manylora.server.kernels.step import Ints

Doubles: TypeAlias = npt.NDArray[np.float64]
Counters: TypeAlias = npt.NDArray[np.uint64]
NOT_FINITE = -1
"""Instead of a token: a logit is NaN or infinite."""
UNTOLD = -1
"""Instead of a number of alternatives: nothing is told, not even of the token itself."""


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Parameters of n rows. What is kept and how ties go, server/engine/sampler.py says."""

    places: Ints
    """[n]: which row of the logits each is."""
    inverse_temperature: Doubles
    """[n]; 0: the best token."""
    top_k: Ints
    """[n]; 0: all."""
    top_p: Doubles
    """[n]; 1 or more: all."""
    min_p: Doubles
    """[n]"""
    seed: Counters
    """[n]: with the next two, of the numbers in [0, 1) that the row is drawn with: SamplerState.uniform."""
    choice: Counters
    """[n]"""
    position: Counters
    """[n]: tokens that were drawn before."""
    told: Ints
    """[n]: alternatives whose log probabilities are wanted beside the token's own; or UNTOLD."""
    masks: Sequence[Ints | None] = ()
    """[n]: of each row the ids that may be drawn, as bits, the lowest first; None: all. Empty: all of all."""

    @classmethod
    def greedy(cls, rows: int) -> "SamplingColumns":
        """Return those of the first so many rows of logits, of which nothing but the best token is wanted."""
        none, zeros, draws = np.zeros(rows, np.int32), np.zeros(rows), np.zeros(rows, np.uint64)
        places, told = np.arange(rows, dtype=np.int32), np.full(rows, UNTOLD, np.int32)
        return cls(places, zeros, none, np.ones(rows), zeros, draws, draws, draws, told)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token for each of n rows, and what is told of it: natural logs of the softmax of the row's logits."""

    ids: Ints
    """[n]; or NOT_FINITE."""
    logprobs: Doubles
    """[n]; of rows that want it."""
    top_ids: Ints
    """[n, k], best first: of a row as many as it wants."""
    top_logprobs: Doubles
    """[n, k]"""


class NativeSampling(Protocol):
    """Sampling of a backend's own. A row's token is its own affair, whoever else is there."""

    def draw(self, logits: Tensor, columns: SamplingColumns) -> Sampled:
        """Choose tokens by logits, float32 [any, vocab], which are left alone. Raises MemoryError."""
        ...

    def report(self, logits: Tensor, places: Ints, ids: Ints, told: Ints) -> Sampled:
        """Tell of given tokens of some rows what ``told`` says, as SamplingColumns' does; all [n]."""
        ...
