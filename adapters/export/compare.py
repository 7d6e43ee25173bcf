"""How far two sets of logits are apart, and how far they may be."""

from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from manylora.adapters.export.errors import ExportFailed

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest relative distance of a merged model from base + adapter, both computed in float32: what rounding the merged
weights once explains, with room for deep models."""
FOUR_BIT_TOLERANCE, FOUR_BIT_RATIO = 0.5, 1.5
"""The same for a model that is rounded to 4 bits again: an absolute distance, and a multiple of how far the base's own
rounding moves the model, of which the larger holds."""
LOSS_ROOM = 0.01
"""Nats by which a loss may differ before it means anything."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Logits beside reference logits, over all positions of the prompts."""

    max_abs: float
    relative: float
    """‖difference‖ / ‖reference‖, the reference less its mean at each position."""
    kl: float
    """Mean KL(reference ‖ other) in nats."""
    top1: float
    """Share of positions with the same most likely token."""


def distance(reference: Tensor, other: Tensor) -> Distance:
    """Compare float32 [positions, vocabulary] with [positions, vocabulary], a position at a time."""
    largest, kl, same, off, size = [], 0.0, 0, 0.0, 0.0
    for one, two in zip(reference, other, strict=True):
        difference = two - one
        largest.append(difference.abs().max())
        off += difference.square().sum().item()
        size += (one - one.mean()).square().sum().item()
        log_p, log_q = one.log_softmax(-1), two.log_softmax(-1)
        kl += torch.dot(log_p.exp(), log_p - log_q).item()
        same += int(one.argmax() == two.argmax())
    return Distance(
        # Of tensors and not of numbers: Python's max passes over NaN.
        max_abs=torch.stack(largest).max().item(),
        relative=sqrt(off / max(size, 1e-30)) if isfinite(off) else off,
        kl=max(0.0, kl / len(reference)),
        top1=same / len(reference),
    )


def check_distance(found: Distance, tolerance: float) -> None:
    """Raise ExportFailed if the merged model is not base + adapter; NaN is no pass."""
    if not found.relative <= tolerance:
        raise ExportFailed(
            f"the merged model's logits differ from base + adapter by {found.relative:.2g} (relative; largest"
            f" {found.max_abs:.2g}), over the tolerance of {tolerance:g}; nothing was published"
        )


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean loss on the sample rows' answers, in nats per token."""

    base: float
    adapter: float
    merged: float


def check_losses(losses: Losses) -> None:
    """Raise ExportFailed if what the adapter had gained on the sample rows is half gone, or more."""
    gain = losses.base - losses.adapter
    lost = losses.merged - losses.adapter
    if gain > LOSS_ROOM and lost > max(LOSS_ROOM, gain / 2):
        raise ExportFailed(
            f"on the sample rows the base has a loss of {losses.base:.3f}, base + adapter {losses.adapter:.3f}, the"
            f" merged model {losses.merged:.3f}: the adapter's change did not survive; nothing was published"
        )
