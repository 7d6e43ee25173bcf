"""A decoder's weights as the loader fills them and the decoder reads them. Immutable once loaded."""

from dataclasses import dataclass

from torch import Tensor

from manylora.server.kernels.linear import PlainLinear


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block. Fused projections are already in the backend's own form (see Backend.prepare)."""

    attn_norm: Tensor
    """[hidden]"""
    qkv: PlainLinear
    """[(heads + 2 · kv heads) · head dim, hidden]: q rows, then k, then v."""
    q_norm: Tensor | None
    """[head dim], Qwen3 only."""
    k_norm: Tensor | None
    o: PlainLinear
    """[hidden, heads · head dim]"""
    mlp_norm: Tensor
    """[hidden]"""
    gate_up: PlainLinear
    """[2 · intermediate, hidden]: gate rows, then up."""
    down: PlainLinear
    """[hidden, intermediate]"""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a decoder."""

    embedding: Tensor
    """[vocab, hidden]"""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    """[hidden]"""
    head: PlainLinear
    """[vocab, hidden]; shares the embedding's storage when the head is tied."""
