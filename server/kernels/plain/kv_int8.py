"""Keys and values in 8 bits: the form that every backend keeps them in, and its arithmetic in plain torch.

A head's values share a scale by GROUP neighbours: keys have channels that are many times the others (Qwen2.5's, from
the biases of its k), and what shares a scale with one of these is rounded as coarsely.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
"""Neighbouring values of a head that share a scale; a head's last group may be shorter."""
MOST = 127
"""The largest code: −128 isn't used."""
LEAST_SCALE = torch.finfo(torch.float32).tiny


def groups_of(head_dim: int) -> int:
    """Return how many scales a head has."""
    return -(-head_dim // GROUP)


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [..., D] of ``x`` [..., D], and bfloat16 scales [..., groups].

    scale = largest magnitude of the group / 127, rounded to bfloat16; code = x / scale, rounded to nearest, ties to
    even. A group with a value that is not finite has the scale NaN; one whose scale is below float32's normal range is
    all zeros. (What is finite is given back finite: the largest float32 as 3.4026e38.)
    """
    wide = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).reshape(*x.shape[:-1], -1, GROUP)
    scales = (wide.abs().amax(-1) / MOST).bfloat16()
    step = scales.float()
    finite, some = step.isfinite(), step >= LEAST_SCALE
    codes = (wide / step[..., None]).round_().clamp_(-MOST, MOST)
    codes = codes.masked_fill_(~(finite & some)[..., None], 0).to(torch.int8)
    scales = scales.masked_fill_(~some, 0).masked_fill_(~finite, torch.nan)
    return codes.flatten(-2)[..., : x.shape[-1]], scales


def dequantize_kv(codes: Tensor, scales: Tensor) -> Tensor:
    """Return what quantize_kv's results stand for: float32 [..., D]."""
    return codes * scales.float().repeat_interleave(GROUP, -1)[..., : codes.shape[-1]]
