"""A matrix that isn't quantised, with the face of those that are, so that a loader treats them alike."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A 16- or 32-bit matrix."""

    weight: Tensor
    """[out, in]"""

    format: ClassVar[str] = "dense"
    is_quantized: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weight.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in ``dtype``; itself if it is stored that way."""
        return self.weight.to(dtype)

    def to(self, device: torch.device) -> "DenseTensor":
        """Return the same matrix on ``device``."""
        return DenseTensor(self.weight.to(device))
