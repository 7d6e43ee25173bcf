"""Adapters in memory: what a peft config says and the tensors, checked and in serving layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Features of a linear layer of the base that an adapter may target."""

    out_features: int
    in_features: int


BaseModules = Mapping[str, ModuleShape]
"""Full module path in the Hugging Face model, e.g. "model.layers.0.self_attn.q_proj", to its shape."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's factors, Δy = x aᵀ b: the scale α/r (or α/√r) is folded into b."""

    a: Tensor
    """[rank, in_features], contiguous."""
    b: Tensor
    """[rank, out_features]: lora_B transposed and scaled, contiguous."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All pairs of an adapter by full module path. Immutable; safe to share between threads."""

    pairs: Mapping[str, LoraPair]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    def rank_by_module(self) -> dict[str, int]:
        """Return the largest rank over all layers for each module name ("q_proj", …), as the arena needs."""
        ranks: dict[str, int] = {}
        for path, pair in self.pairs.items():
            module = path.rsplit(".", 1)[-1]
            ranks[module] = max(ranks.get(module, 0), pair.a.shape[0])
        return ranks


Tier = Literal["device", "host", "disk"]
"""Where an adapter's weights are now. What is on the device may be on the host as well."""


@dataclass(frozen=True, slots=True)
class FreedAdapter:
    """What removing an adapter gave back."""

    rows: int
    """Rank rows of the arena, over all modules."""
    device_bytes: int
    host_bytes: int
    aborted: int
    """Running sequences that were ended for it."""
