"""A decoder's weights as the loader fills them and a backend reads them. Immutable once loaded."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from manylora.server.kernels.shape import DecoderShape


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


class EmbeddingWeight(Protocol):
    """A table of vectors in a backend's own layout."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(vocab, hidden)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block."""

    attn_norm: Tensor
    """[hidden]"""
    qkv: LinearWeight
    """[(heads + 2 · kv heads) · head dim, hidden]: q rows, then k, then v."""
    q_norm: Tensor | None
    """[head dim], where queries and keys are normalised before rope (Qwen3)."""
    k_norm: Tensor | None
    o: LinearWeight
    """[hidden, heads · head dim]"""
    mlp_norm: Tensor
    """[hidden]"""
    gate_up: LinearWeight
    """[2 · intermediate, hidden]: gate rows, then up."""
    down: LinearWeight
    """[hidden, intermediate]"""
    window: int | None = None
    """Sliding window in tokens: a query sees itself and window − 1 before it; None is full attention."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a decoder, and the constants that its ops need."""

    shape: DecoderShape
    eps: float
    """Of all norms."""
    cos: Tensor
    """Rope's tables, float32 [positions, head dim], both halves alike (2104.09864)."""
    sin: Tensor
    embedding: EmbeddingWeight
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    """[hidden]"""
    head: LinearWeight
    """[vocab, hidden]"""
    tied: bool = False
    """Whether the head shares the embedding's storage."""
