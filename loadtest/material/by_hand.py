"""Runs a decoder without an engine: rows with KV blocks of their own, mixed into steps as a check wants them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.loadtest.material.engines import BLOCK
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.step import AdapterRanges, AttentionMetadata, RankRange, StepAdapters, StepBatch
from manylora.server.model.decoder import Decoder
from manylora.server.model.loader import Quantization, load_weights
from manylora.server.model.served import ServedModel

BLOCKS_EACH = 32
ARENA_ROWS = 256


@dataclass(slots=True)
class Row:
    """A sequence: its tokens, how many of them are computed, its weighted adapters, and all logits so far."""

    number: int
    tokens: list[int]
    adapters: tuple[tuple[AdapterRanges, float], ...] = ()
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)

    def blocks(self) -> list[int]:
        """Return its KV blocks: backwards, so that nothing is right because they lie in order."""
        first = 1 + self.number * BLOCKS_EACH
        return list(range(first + BLOCKS_EACH - 1, first - 1, -1))

    def all_logits(self) -> Tensor:
        """Return float32 [tokens computed, vocab]: of as many ids as its adapter has."""
        return torch.cat(self.logits)


def load(directory: Path, backend: AnyBackend, rows: int, quantization: Quantization) -> ServedModel:
    """Load a checkpoint with room for ``rows`` rows and ARENA_ROWS rank rows."""
    config, weights, _ = load_weights(directory, backend, quantization=quantization)
    decoder = Decoder(config, weights, backend)
    return ServedModel(decoder, decoder.new_kv(rows * BLOCKS_EACH, BLOCK), decoder.new_arena(ARENA_ROWS))


def step(model: ServedModel, work: Sequence[tuple[Row, int]]) -> None:
    """Compute the next so many tokens of each row in one step and keep all their logits."""
    counts = [count for _, count in work]
    attention = AttentionMetadata.of_rows(
        [row.computed for row, _ in work], counts, [row.blocks() for row, _ in work], BLOCK
    )
    ids = [token for row, count in work for token in row.tokens[row.computed : row.computed + count]]
    adapters = StepAdapters.of_rows([row.adapters for row, _ in work])
    wanted = np.arange(len(ids), dtype=np.int32)
    output = model(StepBatch(np.array(ids, dtype=np.int32), attention, adapters, wanted))
    first = 0
    for (row, count), part in zip(work, torch.split(output.logits, counts), strict=True):
        own = [output.others[place] for place in range(first, first + count) if place in output.others]
        first += count
        row.computed += count
        row.logits.append(torch.stack(own) if own else part)


def place(model: ServedModel, adapters: Sequence[AdapterWeights]) -> list[AdapterRanges]:
    """Write adapters into the arena, one after the other with gaps; return their ranges."""
    placed: list[AdapterRanges] = []
    next_row = 3
    for weights in adapters:
        ranks = weights.rank_by_module()
        ranges = {module: RankRange(next_row, rank) for module, rank in ranks.items()}
        model.arena.write(ranges, weights)
        next_row += max(ranks.values()) + 1
        placed.append(ranges)
    return placed
