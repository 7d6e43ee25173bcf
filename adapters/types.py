"""Adapters in memory: each one thing to the model, a delta to its base, checked and in serving layout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from manylora.adapters.vocabulary import VOCABULARY, VocabularyDelta


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Features of a linear layer of the base that an adapter may target."""

    out_features: int
    in_features: int
    bias: bool = False
    """Whether it has a bias."""


BaseModules = Mapping[str, ModuleShape]
"""Full module path in the Hugging Face model, e.g. "model.layers.0.self_attn.q_proj", to its shape."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's factors, Δy = x aᵀ b: the scale α/r (or α/√r) is folded into b."""

    a: Tensor
    """[rank, in_features], contiguous."""
    b: Tensor
    """[rank, out_features]: lora_B transposed and scaled, contiguous."""


class ServedBase(Protocol):
    """What some adapters are relative to: the base's linear layers as they are served. Called from any thread."""

    def row_norms(self, path: str, a: Tensor, b: Tensor) -> Tensor:
        """Return ‖W + b a‖ of each row of the W at ``path``, float32 [out], for float32 a [rank, in] and b [out, rank].

        DoRA divides by them (2402.09353). Takes memory for a few rows of W.
        """
        ...

    def bias(self, path: str) -> Tensor:
        """Return the bias of a layer that has one, float32 [out]."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """What an adapter changes, by full module path: y = (1 + gain) ⊙ W x + bias + offset + x aᵀ b.

    Immutable; safe to share between threads. A mixture sums gains, offsets and pairs, each times its part's weight.
    """

    pairs: Mapping[str, LoraPair]
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    """Of modules whose output is scaled, float32 [out_features]: what is added to 1 (DoRA)."""
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    """Of modules whose output is shifted, float32 [out_features]: trained biases, less the base's."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in a prompt on it acts (aLoRA); (): it always does."""
    vocabulary: VocabularyDelta | None = None
    """What it changes of embedding and head; None: nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        factors = sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())
        tokens = 0 if self.vocabulary is None else self.vocabulary.nbytes
        outputs = sum(own.nbytes for each in (self.gains, self.offsets) for own in each.values())
        return factors + tokens + outputs

    @property
    def rank(self) -> int:
        """The largest rank of all modules."""
        return max((pair.a.shape[0] for pair in self.pairs.values()), default=0)

    def rank_by_module(self) -> dict[str, int]:
        """Return the rank rows that the arena needs for each module name ("q_proj", …): see ``rows_by_module``.

        Under VOCABULARY stand the units that embedding and head take.
        """
        ranks = {path: pair.a.shape[0] for path, pair in self.pairs.items()}
        rows = rows_by_module(ranks, self.gains, self.offsets)
        return rows if self.vocabulary is None else {**rows, VOCABULARY: self.vocabulary.units}


def rows_by_module(ranks: Mapping[str, int], *outputs: Collection[str]) -> dict[str, int]:
    """Return the rank rows of each module name: the largest rank over all layers, and one more for each of ``outputs``
    in which the module is: those that are scaled, those that are shifted. All by full path.
    """
    rows: dict[str, int] = {}
    for path, rank in ranks.items():
        module = path.rsplit(".", 1)[-1]
        rows[module] = max(rows.get(module, 0), rank)
    for paths in outputs:
        for module in {path.rsplit(".", 1)[-1] for path in paths}:
            rows[module] = rows.get(module, 0) + 1
    return rows


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
