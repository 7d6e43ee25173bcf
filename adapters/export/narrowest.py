"""Which type of weights keeps an adapter's change: measured on every changed matrix before anything is written.

A weight on bfloat16's grid plus a change below half a step of it rounds to the weight again, and a dequantised weight,
which lies on no grid, is moved by the rounding itself. So the types are tried from the narrowest on.
"""

import contextlib
from collections.abc import Callable, Mapping

import torch

from manylora.adapters.export.companions import dtype_name
from manylora.adapters.export.errors import ExportFailed
from manylora.adapters.export.forms import DEQUANTIZED, SIXTEEN_BIT
from manylora.adapters.export.merge import MergedWeights
from manylora.adapters.export.plan import MergePlan
from manylora.adapters.export.rows import chunks
from manylora.adapters.export.write import (
    Survival,
    Tally,
    check_survival,
    share_exact,
    share_kept,
    survival_in_nf4,
)
from manylora.quant.served_form import HELD_BY

TYPES = (torch.bfloat16, torch.float16, torch.float32)
"""From the narrowest on: the first two have two bytes, of which float16 spends more on digits and less on range."""
ENOUGH = 0.999
"""Share of the change that the type of a merged model must keep when nobody asks for another."""


def measure(
    merged: MergedWeights, shapes: Mapping[str, tuple[int, ...]], progress: Callable[[float], None]
) -> dict[torch.dtype, float]:
    """Return the share of the change that each type keeps; without a type that some weight is too large for."""
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    done = 0
    found: dict[torch.dtype, dict[str, Survival]] = {dtype: {} for dtype in TYPES}
    for name, shape in shapes.items():
        for dtype, tally in _measure_one(merged, name, tuple(found)).items():
            if tally is None:
                del found[dtype]
                continue
            survival = tally.survival()
            if survival is not None:
                found[dtype][name] = survival
        done += torch.Size(shape).numel()
        progress(done / total)
    return {dtype: share_exact(survived) for dtype, survived in found.items()}


def narrowest(kept: Mapping[torch.dtype, float], base: torch.dtype) -> torch.dtype:
    """Return the first of TYPES that keeps enough of the change, and all of a base that is stored in ``base``."""
    names = HELD_BY[dtype_name(base)]
    wide = [dtype for dtype in TYPES if dtype_name(dtype) in names]
    return next((dtype for dtype in wide if kept.get(dtype, 0.0) >= ENOUGH), torch.float32)


def remedy(plan: MergePlan, kept: Mapping[torch.dtype, float]) -> str:
    """Return what keeps a change that was rounded away: nothing that would lose it too."""
    if not plan.form.four_bit:
        dtype = narrowest(kept, plan.base.dtype())
        return f"--dtype {dtype_name(dtype)} keeps {kept.get(dtype, 1.0):.1%} of it"
    found = ["--format merged keeps it"]
    if plan.into == DEQUANTIZED and SIXTEEN_BIT in plan.weights:
        survived = survival_in_nf4(plan.merged(SIXTEEN_BIT), plan.form)
        with contextlib.suppress(ExportFailed):
            check_survival(survived, str)
            found.append(f"so does --into 16bit ({share_kept(survived):.0%} of it)")
    return ", ".join(found)


def _measure_one(
    merged: MergedWeights, name: str, dtypes: tuple[torch.dtype, ...]
) -> dict[torch.dtype, Tally | None]:
    """Return what became of one parameter's change in each type; None for a type that can't hold its weights."""
    source, change = merged.unchanged(name), merged.change(name)
    tallies: dict[torch.dtype, Tally | None] = {dtype: Tally() for dtype in dtypes}
    for first, last in chunks(source.shape):
        base = source.rows(first, last)
        exact = base if change is None else change.on(base, slice(first, last))
        for dtype, tally in tallies.items():
            if tally is None:
                continue
            written = exact.to(dtype)
            if not bool(torch.isfinite(written).all()):
                tallies[dtype] = None
            elif change is not None:
                tally.add(base, exact, written.float())
    return tallies
