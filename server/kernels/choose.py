"""The one place that chooses a backend."""

import torch

from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.plain import PlainBackend


def choose_backend(device: torch.device, dtype: torch.dtype) -> AnyBackend:
    """Return the fastest backend for a device and the dtype of activations there."""
    return PlainBackend(device, dtype)
