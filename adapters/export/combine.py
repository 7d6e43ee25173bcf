"""Several weighted pairs of factors as one: side by side (cat, exact), or the nearest of a wanted rank (svd).

All in float64: what a result is rounded to afterwards is measured, not assumed. peft's own ways: peft_methods.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manylora.adapters.export.change import Factors

Pair = tuple[Tensor, Tensor]
"""a [rank, in] and b [out, rank]: what it adds is b a, the scale is in it."""
Combination = Callable[[str, Sequence[Factors]], Pair]
"""Makes one pair of a module's pairs; the module's path is for messages."""


def side_by_side(path: str, factors: Sequence[Factors]) -> Pair:
    """Return Σ scale · b a as it is: the rank is the sum of the ranks."""
    return (
        torch.cat([each.a for each in factors]).double(),
        torch.cat([each.b.double() * each.scale for each in factors], dim=1),
    )


def nearest(rank: int) -> Combination:
    """Return the combination whose result has at most ``rank``: of all such, the nearest in the Frobenius norm.

    Eckart and Young, Psychometrika 1936. The matrix itself is never made: its singular values are those of a small
    one between the QR factors of both sides.
    """

    def combined(path: str, factors: Sequence[Factors]) -> Pair:
        a, b = side_by_side(path, factors)
        left, small_b = torch.linalg.qr(b)
        right, small_a = torch.linalg.qr(a.T)
        u, sizes, v = torch.linalg.svd(small_b @ small_a.T)
        kept = min(rank, len(sizes))
        roots = sizes[:kept].sqrt()
        return roots[:, None] * (v[:kept] @ right.T), (left @ u[:, :kept]) * roots

    return combined


def norm(pair: Pair) -> float:
    """Return ‖b a‖, Frobenius, without making the product."""
    a, b = (each.double() for each in pair)
    small_b, small_a = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.T, mode="r").R
    return float(torch.linalg.matrix_norm(small_b @ small_a.T))


def difference(pair: Pair, wanted: Pair) -> float:
    """Return ‖b a - b' a'‖, Frobenius."""
    a = torch.cat([pair[0].double(), wanted[0].double()])
    return norm((a, torch.cat([pair[1].double(), -wanted[1].double()], dim=1)))
