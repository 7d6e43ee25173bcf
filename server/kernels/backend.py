"""The contract of a compute backend: five ops a block, and embed and head. One Decoder runs on any of them.

A backend owns how a linear weight is laid out (``prepare``), so that a native kernel can pack at load time, and
what it derives from a step's metadata (``plan_attention``, ``build_lora``), so that this happens once per step.
``LinearWeight``, ``AttentionPlan`` and ``LoraMetadata`` are opaque to everyone but the backend that made them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

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

    @property
    def is_quantized(self) -> bool:
        """Whether it is held in fewer bits than it computes in."""
        ...

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix in ``dtype``, freshly allocated unless it is stored that way."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the same matrix on ``device``."""
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


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """What ``attend`` needs of a layer beside its caches."""

    q_norm: Tensor | None
    """[head dim], where queries and keys are normalised before rope."""
    k_norm: Tensor | None
    eps: float
    window: int | None
    """Sliding window in tokens; None is full attention."""
