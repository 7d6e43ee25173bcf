"""What of a model a backend must know to lay out memory for it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a decoder, before any weight is loaded."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    modules: Mapping[str, tuple[int, int]]
    """(out_features, in_features) of each of LORA_MODULES."""
    paths: tuple[Mapping[str, str], ...]
    """By layer: each module's path in the Hugging Face model, by which adapters name it."""
