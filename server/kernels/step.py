"""A step as a backend is given it: arrays that say its tokens, their places in the paged KV, and each row's adapters.

Built by the model runner, on the host; nothing here is global, and nothing here decides anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from manylora.adapters.vocabulary import VOCABULARY

Ints: TypeAlias = npt.NDArray[np.int32]
Floats: TypeAlias = npt.NDArray[np.float32]

NULL_BLOCK = 0
"""The KV block that belongs to no sequence: what padding names and may write to. Nobody's keys lie there."""
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Rows of a mixed step: B sequences with Q_b new tokens each, T = Σ Q_b tokens in all.

    A decode row is a sequence with Q_b = 1; a prefill row brings a chunk of its prompt. Tokens of one
    sequence are contiguous, in order.
    """

    positions: Ints
    """[T]: position of each token in its own sequence, from 0."""
    slots: Ints
    """[T]: where the token's k and v go: block id × block size + offset in the block."""
    query_start: Ints
    """[B + 1]: prefix sums of Q_b: first 0, last T."""
    context_lens: Ints
    """[B]: tokens of the sequence in the KV cache once this step's tokens are written."""
    block_tables: Ints
    """[B, max blocks]: the sequence's KV blocks in order; entries past its last block are NULL_BLOCK."""

    @classmethod
    def of_rows(
        cls,
        starts: Sequence[int],
        lengths: Sequence[int],
        tables: Sequence[Sequence[int]],
        block_size: int,
    ) -> "AttentionMetadata":
        """Lay out rows: how many tokens of each sequence are computed already, how many are now, and its blocks."""
        grid = np.full((len(tables), max(map(len, tables), default=0)), NULL_BLOCK, dtype=np.int32)
        for blocks, table in zip(grid, tables, strict=True):
            blocks[: len(table)] = table
        return cls.of_tables(
            np.array(starts, dtype=np.int32), np.array(lengths, dtype=np.int32), grid, block_size
        )

    @classmethod
    def of_decodes(
        cls, starts: Ints, rows: Ints, query_start: Ints, grid: Ints, block_size: int
    ) -> "AttentionMetadata":
        """Lay out rows of one token each; ``rows`` are 0 … B − 1, ``query_start`` 0 … B."""
        slots = grid[rows, starts // block_size] * block_size + starts % block_size
        return cls(starts, slots, query_start, starts + np.int32(1), grid)

    @classmethod
    def of_tables(cls, first: Ints, count: Ints, grid: Ints, block_size: int) -> "AttentionMetadata":
        """Lay out rows: see ``of_rows``; ``grid`` are the block tables, [B, max blocks]."""
        query_start = np.concatenate((np.zeros(1, dtype=np.int32), np.cumsum(count, dtype=np.int32)))
        owners = np.repeat(np.arange(len(count)), count)
        positions = np.arange(query_start[-1], dtype=np.int32) - np.repeat(query_start[:-1] - first, count)
        slots = grid[owners, positions // block_size] * block_size + positions % block_size
        return cls(positions, slots, query_start, first + count, grid)


@dataclass(frozen=True, slots=True)
class RankRange:
    """A contiguous range of rank rows in one module's arena buffers."""

    start: int
    rank: int


AdapterRanges = Mapping[str, RankRange]
"""Module name (one of LORA_MODULES, or VOCABULARY) to the range an adapter owns there. Modules it doesn't target are
absent."""
WeightedAdapters = tuple[tuple[AdapterRanges, float], ...]
"""(ranges, weight) pairs: Δy = Σ weight · x Aᵀ Bᵀ, summed in this order; weights are float32's values. Empty means
the base model alone."""


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """Which adapters each row uses: those of row b are numbers ``start[b]`` to ``start[b + 1]``, in order."""

    ranges: tuple[AdapterRanges, ...]
    """Of the adapters of this step, each once."""
    start: Ints
    """[B + 1]"""
    which: Ints
    """[start[B]]: numbers in ``ranges``."""
    weights: Floats

    @property
    def have_vocabularies(self) -> bool:
        """Whether some of them have an embedding or a head of their own."""
        return any(VOCABULARY in owned for owned in self.ranges)

    @classmethod
    def of_rows(cls, rows: Sequence[WeightedAdapters]) -> "StepAdapters":
        """Number the adapters of a step's rows. Mappings are told apart by identity."""
        numbers: dict[int, int] = {}
        ranges: list[AdapterRanges] = []
        which: list[int] = []
        weights: list[float] = []
        start = [0]
        for row in rows:
            for owned, weight in row:
                number = numbers.setdefault(id(owned), len(ranges))
                if number == len(ranges):
                    ranges.append(owned)
                which.append(number)
                weights.append(weight)
            start.append(len(which))
        return cls(
            tuple(ranges),
            np.array(start, dtype=np.int32),
            np.array(which, dtype=np.int32),
            np.array(weights, dtype=np.float32),
        )


@dataclass(frozen=True, slots=True)
class LoraSpan:
    """Contiguous tokens [start, start + length) of a step, all of which use the same weighted adapters."""

    start: int
    length: int
    adapters: WeightedAdapters


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The T tokens of one step, and of which of them logits or states are wanted."""

    token_ids: Ints
    """[T]"""
    attention: AttentionMetadata
    adapters: StepAdapters
    logits_rows: Ints
    """[n]: the tokens whose logits are wanted."""
    state_rows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    """[k]: the tokens whose last hidden states are wanted."""


def lora_spans(batch: StepBatch) -> list[LoraSpan]:
    """Return the step's tokens as spans, in order; neighbours that use the same adapters share one."""
    spans: list[LoraSpan] = []
    starts = batch.attention.query_start.tolist()
    for (first, last), adapters in zip(pairwise(starts), _by_row(batch.adapters), strict=True):
        if spans and spans[-1].adapters == adapters:
            spans[-1] = LoraSpan(spans[-1].start, spans[-1].length + last - first, adapters)
        else:
            spans.append(LoraSpan(first, last - first, adapters))
    return spans


def _by_row(adapters: StepAdapters) -> Iterator[WeightedAdapters]:
    pairs = [
        (adapters.ranges[number], weight)
        for number, weight in zip(adapters.which.tolist(), adapters.weights.tolist(), strict=True)
    ]
    for first, last in pairwise(adapters.start.tolist()):
        yield tuple(pairs[first:last])
