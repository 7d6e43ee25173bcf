"""How rows are sampled, as a backend that does it itself is told: one column for each parameter.

What a running sequence's row says stays the same from step to step, but for its position; so it is kept.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from manylora.server.engine.logits import MASK_64, SamplerState, SamplingRow
from manylora.server.kernels.sampling import UNTOLD, SamplingColumns
from manylora.server.kernels.step import Ints

COLDEST = 1e-20
"""Temperatures below this are raised to it: 1/T must stay finite in float32."""
Kept: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.void]]"
KEPT = np.dtype(
    [
        ("inverse_temperature", "f8"),
        ("top_k", "i4"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("seed", "u8"),
        ("choice", "u8"),
        ("told", "i4"),
    ]
)
"""What doesn't change of a row."""


def kept_of(row: SamplingRow, vocab_size: int) -> tuple[float, int, float, float, int, int, int]:
    """Return KEPT's fields."""
    params, state = row.params, row.state
    return (
        1.0 / max(params.temperature, COLDEST) if params.temperature > 0 else 0.0,
        min(params.top_k, vocab_size),
        params.top_p,
        params.min_p,
        state.seed & MASK_64,
        state.choice_index,
        UNTOLD if params.logprobs is None else params.logprobs,
    )


def columns_of(rows: Sequence[SamplingRow], vocab_size: int) -> SamplingColumns:
    """Return the columns of rows, each of which is the logits' row of the same number."""
    kept = np.array([kept_of(row, vocab_size) for row in rows], dtype=KEPT)
    masks = [row.mask for row in rows]
    held = masks if any(mask is not None for mask in masks) else ()
    return columns_from(kept, np.arange(len(rows), dtype=np.int32), [row.state for row in rows], held)


def columns_from(
    kept: Kept, places: Ints, states: Sequence[SamplerState], masks: Sequence[Ints | None] = ()
) -> SamplingColumns:
    """Return the columns of rows of which ``kept`` [n] says what doesn't change, in memory of their own.

    Within ``kept`` they lie where numbers of 8 bytes may not, and one row's would pass for contiguous.
    """
    return SamplingColumns(
        places=places,
        masks=masks,
        position=np.array([state.output_length for state in states], dtype=np.uint64),
        **{name: kept[name].copy() for name in KEPT.fields or ()},
    )
