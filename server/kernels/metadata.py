"""What a step's kernels need to know about its rows: attention over paged KV, and which adapters each token uses.

Built once per step by the model runner and passed to every op as an argument; nothing here is global, and
nothing here decides anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

NULL_BLOCK = 0
"""The KV block that belongs to no sequence: what padding names and may write to. Nobody's keys lie there."""
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Rows of a mixed step: B sequences with Q_b new tokens each, T = Σ Q_b tokens in all.

    A decode row is a sequence with Q_b = 1; a prefill row brings a chunk of its prompt. Tokens of one
    sequence are contiguous, in order.
    """

    positions: Tensor
    """int64 [T]: position of each token in its own sequence, from 0."""
    slots: Tensor
    """int64 [T]: where the token's k and v go: block id × block size + offset in the block."""
    query_start: tuple[int, ...]
    """B + 1 prefix sums of Q_b: first 0, last T."""
    context_lens: tuple[int, ...]
    """B numbers: tokens of the sequence in the KV cache once this step's tokens are written."""
    block_tables: Tensor
    """int64 [B, max blocks]: the sequence's KV blocks in order; entries past its last block are NULL_BLOCK."""


@dataclass(frozen=True, slots=True)
class RankRange:
    """A contiguous range of rank rows in one module's arena buffers."""

    start: int
    rank: int


AdapterRanges = Mapping[str, RankRange]
"""Module name (one of LORA_MODULES) to the range an adapter owns there. Modules it doesn't target are absent."""


@dataclass(frozen=True, slots=True)
class LoraSpan:
    """Contiguous tokens [start, start + length) of a step, all of which use the same weighted adapters."""

    start: int
    length: int
    adapters: tuple[tuple[AdapterRanges, float], ...]
    """(ranges, weight) pairs: Δy = Σ weight · x Aᵀ Bᵀ, summed in this order; weights are float32's values. Empty means
    the base model alone."""
