"""Small arrays that the host writes and a device reads, at a place that stays the same."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Mirrored:
    """An array on the host and its copy on a device, both zero at first."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """``dtype``: int32 or float32."""
        source = torch.zeros(shape, dtype=dtype)
        self._source = source.pin_memory() if device.type == "cuda" else source
        self.host: npt.NDArray[np.generic] = self._source.numpy()
        self.device: Tensor = torch.zeros(shape, dtype=dtype, device=device)

    def send(self) -> None:
        """Have the device copy what the host wrote, in turn; until it is done with that, the host writes no more."""
        self.device.copy_(self._source, non_blocking=True)
