"""How far two sets of logits are apart, and how far they may be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.export.errors import ExportFailed

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest relative distance of a merged model from base + adapter, both computed in float32: what rounding the merged
weights once explains, with room for deep models."""
FOUR_BIT_TOLERANCE = 0.5
"""The same for a model that is rounded to 4 bits again, which moves it about as far as the base's own rounding did."""
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
    """Compare float32 [positions, vocabulary] with [positions, vocabulary]."""
    difference = other - reference
    centred = reference - reference.mean(dim=-1, keepdim=True)
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    return Distance(
        max_abs=difference.abs().max().item(),
        relative=(difference.norm() / centred.norm().clamp(min=1e-30)).item(),
        kl=max(0.0, (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()),
        top1=(reference.argmax(-1) == other.argmax(-1)).float().mean().item(),
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
