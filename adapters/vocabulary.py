"""What an adapter changes of embedding and head, in serving layout: rows of its own, factors, and how many ids it has.

Tensors that were checked; vocabulary_reader.py makes them. Here is what the base's own vocabulary is to an adapter too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from torch import Tensor

EMBEDDING: Final = "model.embed_tokens"
HEAD: Final = "lm_head"
TOKEN_MODULES: Final = (EMBEDDING, HEAD)
"""Paths in the Hugging Face model."""
VOCABULARY: Final = "vocabulary"
"""What adapters own of the device beside rank rows, among the arena's modules: memory, in pieces of UNIT bytes."""
UNIT: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class BaseVocabulary:
    """Embedding and head of the base, as far as adapters are held against them."""

    size: int
    """Rows."""
    hidden: int
    tied: bool
    """Whether the head is the embedding."""
    show: Callable[[str], Tensor | None] = lambda path: None
    """The rows [size, hidden] of one of TOKEN_MODULES, to be read once and let go; None: they aren't held as rows."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows that stand in the place of the base's, or beyond them."""

    rows: Tensor
    """[n, hidden], contiguous."""
    ids: Tensor | None
    """int64 [n], ascending, on the host: whose they are; None: of ids 0 to n − 1, all that there are."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenFactors:
    """LoRA of the embedding, Δe[id] = a[:, id]ᵀ b, or the head, Δlogits = h aᵀ b: the scale is folded into b."""

    a: Tensor
    """[rank, vocabulary] of the embedding, [rank, hidden] of the head; contiguous."""
    b: Tensor
    """[rank, hidden] of the embedding, [rank, vocabulary] of the head; contiguous."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenDelta:
    """What becomes of the embedding, or of the head: rows first, then factors."""

    rows: TokenRows | None = None
    factors: TokenFactors | None = None

    def __bool__(self) -> bool:
        return self.rows is not None or self.factors is not None

    def tensors(self) -> Iterator[Tensor]:
        """Yield what it holds."""
        if self.rows is not None:
            yield self.rows.rows
            if self.rows.ids is not None:
                yield self.rows.ids
        if self.factors is not None:
            yield self.factors.a
            yield self.factors.b


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyDelta:
    """What an adapter does to the vocabulary. Immutable; safe to share between threads."""

    size: int
    """Its ids: 0 to size − 1. Those from the base's size on are its own, and both modules have rows for each."""
    embedding: TokenDelta
    head: TokenDelta

    @property
    def nbytes(self) -> int:
        """Bytes held; what embedding and head share counts once."""
        each = [*self.embedding.tensors(), *self.head.tensors()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in each}.values())

    @property
    def units(self) -> int:
        """Pieces of UNIT bytes that it takes."""
        return units_of(self.nbytes)


def units_of(nbytes: int) -> int:
    """Return how many pieces of UNIT bytes hold so many."""
    return -(-nbytes // UNIT)
