"""Steps in which the same streams decode a token each: the arrays of the one before, changed where they change.

A step of native kernels streams the weights through the caches, so whatever Python touches between two of them comes
from memory. Most steps have the rows of the one before; such a one keeps batch and columns, and the backend what it
has laid out for these very objects.
"""

import operator
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from manylora.server.engine.logits import SamplerState
from manylora.server.engine.sequence import Sequence as Stream
from manylora.server.engine.step_plan import ScheduledRow
from manylora.server.kernels.sampling import UNTOLD, SamplingColumns
from manylora.server.kernels.step import NULL_BLOCK, AdapterRanges, StepBatch

SPARE = 8
"""Blocks that a table may grow by before another array is needed."""
Table = Callable[[int], "array[int]"]
"""A sequence's blocks, by its number."""
Ranges = Callable[[int], AdapterRanges]
"""What an adapter owns in the arena, by its id; another object once it was moved."""


@dataclass(slots=True)
class SteadyStep:
    """What a step was, and what the next is as long as nobody comes, leaves, or has more to compute than a token."""

    batch: StepBatch
    columns: SamplingColumns
    places: list[int]
    _streams: list[Stream]
    _samplers: list[SamplerState]
    _tables: "list[array[int]]"
    _filled: list[int]
    """Blocks of each that the batch has."""
    _adapters: list[int]
    _ranges: list[AdapterRanges]
    _block_size: int

    @classmethod
    def of(
        cls,
        rows: Sequence[ScheduledRow],
        batch: StepBatch,
        columns: SamplingColumns,
        table: Table,
        ranges: Ranges,
        block_size: int,
    ) -> "SteadyStep | None":
        """Return that of a step, whose arrays it takes; None if one of its rows has more to it than a next token."""
        streams = [row.sequence for row in rows]
        if not all(row.length == 1 and row.samples and row.sequence.told == UNTOLD for row in rows) or any(
            stream.wants_prompt_logprobs or stream.pooling is not None for stream in streams
        ):
            return None
        tables = [table(stream.number) for stream in streams]
        grid = batch.attention.block_tables
        wider = np.full((len(grid), grid.shape[1] + SPARE), NULL_BLOCK, dtype=np.int32)
        wider[:, : grid.shape[1]] = grid
        attention = replace(batch.attention, block_tables=wider)
        adapters = [adapter_id for stream in streams for adapter_id, _ in stream.adapters]
        return cls(
            replace(batch, attention=attention),
            columns,
            list(range(len(rows))),
            streams,
            [stream.text.sampler for stream in streams],
            tables,
            [len(each) for each in tables],
            adapters,
            [ranges(adapter_id) for adapter_id in adapters],
            block_size,
        )

    def goes_on(self, rows: Sequence[ScheduledRow], table: Table, ranges: Ranges) -> bool:
        """Change the arrays to what the rows are now; False, and nothing is changed: it is another step."""
        if [row.sequence for row in rows] != self._streams or not all(row.samples for row in rows):
            return False
        tables = [table(stream.number) for stream in self._streams]
        same = all(map(operator.is_, tables, self._tables))
        if not same or not all(map(operator.is_, self._ranges, map(ranges, self._adapters))):
            return False
        starts = [row.start for row in rows]
        if sum([row.length for row in rows]) != len(rows) or not self._take_blocks():
            return False
        attention, size = self.batch.attention, self._block_size
        attention.positions[:] = starts
        np.add(attention.positions, 1, out=attention.context_lens)
        attention.slots[:] = [
            blocks[start // size] * size + start % size for blocks, start in zip(tables, starts, strict=True)
        ]
        self.batch.token_ids[:] = [
            stream.token_ids[start] for stream, start in zip(self._streams, starts, strict=True)
        ]
        self.columns.position[:] = [sampler.output_length for sampler in self._samplers]
        return True

    def _take_blocks(self) -> bool:
        """Take in what the tables have more; False if that is too much."""
        lengths = list(map(len, self._tables))
        if lengths == self._filled:
            return True
        grid = self.batch.attention.block_tables
        if max(lengths) > grid.shape[1]:
            return False
        for number, (before, now) in enumerate(zip(self._filled, lengths, strict=True)):
            if now != before:
                grid[number, before:now] = self._tables[number][before:]
        self._filled = lengths
        return True
