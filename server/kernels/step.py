"""A step as a backend is given it, and what comes out: its tokens, attention over paged KV, and each token's adapters.

Built by the model runner; nothing here is global, and nothing here decides anything.
"""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The T tokens of one step, and of which of them logits are wanted."""

    token_ids: Tensor
    """int64 [T]"""
    attention: AttentionMetadata
    spans: Sequence[LoraSpan]
    """In the order of their tokens; those of no span use the base alone."""
    logits_rows: Tensor
    """int64 [n]: the tokens whose logits are wanted."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What comes out of the model, before anything is sampled."""

    logits: Tensor
    """float32 [n, vocab], of the tokens that were asked for."""
    finite: Tensor
    """bool [T]: whether what the token wrote to the KV cache, in each layer, and its last hidden state are finite.
    What is not must be neither read again nor sampled from."""
