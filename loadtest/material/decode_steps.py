"""Steps of a decoder without an engine, as large as wanted: rows that decode or bring a prompt's chunk."""

from collections.abc import Sequence

import numpy as np

from manylora.loadtest.material.engines import BLOCK
from manylora.loadtest.material.random_model import random_adapter
from manylora.server.kernels.step import AdapterRanges, AttentionMetadata, RankRange, StepAdapters, StepBatch
from manylora.server.model.served import ServedModel


def place_adapters(model: ServedModel, ranks: Sequence[int]) -> list[AdapterRanges]:
    """Fill the arena with an adapter of noise on all modules for each of ``ranks``, one after the other."""
    placed: list[AdapterRanges] = []
    config, backend, start = model.decoder.config, model.decoder.backend, 0
    for number, rank in enumerate(ranks):
        ranges = {module: RankRange(start, rank) for module in config.module_shapes()}
        model.arena.write(ranges, random_adapter(config, rank, backend.dtype, backend.device, number))
        placed.append(ranges)
        start += rank
    return placed


def decode_step(
    model: ServedModel, rows: int, context: int, adapters: Sequence[AdapterRanges], tokens: int = 1
) -> StepBatch:
    """Return a step in which each of ``rows`` sequences computes the last ``tokens`` of its ``context`` tokens.

    Row i uses adapter i mod their number; without any, all rows are the base's.
    """
    blocks = -(-context // BLOCK)
    tables = np.arange(1, rows * blocks + 1, dtype=np.int32).reshape(rows, blocks)
    used = [((adapters[row % len(adapters)], 1.0),) if adapters else () for row in range(rows)]
    vocabulary = model.decoder.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, rows * tokens, dtype=np.int32)
    return StepBatch(
        ids,
        AttentionMetadata.of_rows([context - tokens] * rows, [tokens] * rows, tables.tolist(), BLOCK),
        StepAdapters.of_rows(used),
        np.arange(tokens - 1, rows * tokens, tokens, dtype=np.int32),
    )
