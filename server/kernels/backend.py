"""The contract of a compute backend: five ops a block, and embed and head. One Decoder runs on any of them.

A backend owns how a linear weight is laid out (``prepare``), so that a native kernel can pack at load time.
``LinearWeight`` is opaque to everyone but the backend that made it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """A weight matrix as quant/ reads it: plain 16/32-bit, NF4, GPTQ or AWQ."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and zero points included."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix in ``dtype``, freshly allocated unless it is stored that way."""
        ...


class LinearWeight(Protocol):
    """A matrix in a backend's own layout, with its bias."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the fused matrix."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...


class LinearPreparer(Protocol):
    """The part of a backend that the loader needs."""

    def prepare(self, parts: Sequence[WeightSource], bias: Tensor | None) -> LinearWeight:
        """Stack ``parts`` along out_features (q, k, v are one matmul) in this backend's layout and device."""
        ...
