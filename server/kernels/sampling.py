"""How a backend that samples itself is told of rows, and what it says of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from manylora.server.kernels.step import Ints

Doubles: TypeAlias = npt.NDArray[np.float64]
NOT_FINITE, MORE_DRAWS = -1, -2
"""Instead of a token: a logit is NaN or infinite; or the row needs more uniform numbers than it was given."""


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Parameters of n rows. What is kept and how ties go, server/engine/sampler.py says."""

    inverse_temperature: Doubles
    """[n]; 0: the best token."""
    top_k: Ints
    """[n]; 0: all."""
    top_p: Doubles
    """[n]; 1 or more: all."""
    min_p: Doubles
    """[n]"""
    uniform: Doubles
    """[n, draws] in [0, 1): taken one after the other until one falls on a token that is kept."""


Draw = Callable[[Tensor, SamplingColumns], Ints]
"""Chooses a token for each row of logits, float32 [n, vocab], which are left alone; a row's is its own affair."""
