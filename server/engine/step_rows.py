"""What a step's arrays say of each running sequence, kept from step to step and changed where it has changed.

A sequence has a place of its own, where its block table and how it is sampled lie until it is over or computed again. A
step picks its rows from these; what it reads of a sequence itself is its last token and its length.
"""

import operator
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from manylora.server.engine.activation import AdapterKey
from manylora.server.engine.columns import KEPT, columns_from, kept_of
from manylora.server.engine.logits import SamplingRow
from manylora.server.engine.sequence import Sequence as Stream
from manylora.server.engine.sequence import SequenceStatus
from manylora.server.engine.step_plan import ScheduledRow
from manylora.server.kernels.sampling import SamplingColumns
from manylora.server.kernels.step import (
    NULL_BLOCK,
    AdapterRanges,
    AttentionMetadata,
    Ints,
    StepAdapters,
    StepBatch,
)

FIRST_PLACES, FIRST_BLOCKS = 16, 16
"""Places, and blocks of a table, that there is room for at first; twice as many whenever more are needed."""


@dataclass(slots=True)
class _Place:
    number: int
    stream: Stream
    table: "array[int]"
    """The block manager's own: another one when the sequence is computed again."""
    filled: int
    """Blocks of it that have been copied."""


@dataclass(frozen=True, slots=True)
class _Picked:
    """What steps with the same rows share."""

    places: list[int]
    index: Ints
    """[B]: the rows' places."""
    keys: list[AdapterKey]
    """The rows' adapters."""
    every: Ints
    """0 … B: with one token a row, the rows' numbers and where each begins."""
    ranges: list[AdapterRanges]
    """Of the rows' adapters, one after the other: another object where an adapter was moved."""
    adapters: StepAdapters


class StepRows:
    """Builds batches. Not thread-safe."""

    def __init__(
        self,
        block_size: int,
        vocab_size: int,
        table: Callable[[int], "array[int]"],
        ranges: Callable[[int], AdapterRanges],
    ) -> None:
        """``table``: a sequence's blocks, by its number; ``ranges``: what an adapter owns in the arena, by its id."""
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._table = table
        self._ranges = ranges
        self._places: dict[int, _Place] = {}
        self._free: list[int] = []
        self._tables = np.full((0, FIRST_BLOCKS), NULL_BLOCK, dtype=np.int32)
        self._sampling = np.zeros(0, dtype=KEPT)
        self._picked: _Picked | None = None
        self._drawn: list[int] | None = None
        self._drawn_kept = self._sampling

    def __len__(self) -> int:
        """Return how many sequences have a place."""
        return len(self._places)

    def batch(
        self, rows: Sequence[ScheduledRow], logits_rows: Sequence[int], state_rows: Sequence[int] = ()
    ) -> StepBatch:
        """Return the batch that computes the rows, and tells logits and states of its tokens at these places."""
        places = [self._place(row.sequence) for row in rows]
        picked = self._pick([place.number for place in places], rows)
        width = max([place.filled for place in places], default=0)
        starts = np.array([row.start for row in rows], dtype=np.int32)
        grid = self._tables[picked.index, :width]
        count = sum([row.length for row in rows])
        if count == len(rows):
            ids = [row.sequence.token_ids[row.start] for row in rows]
            attention = AttentionMetadata.of_decodes(
                starts, picked.every[:-1], picked.every, grid, self._block_size
            )
        else:
            ids = [t for row in rows for t in row.sequence.token_ids[row.start : row.start + row.length]]
            lengths = np.array([row.length for row in rows], dtype=np.int32)
            attention = AttentionMetadata.of_tables(starts, lengths, grid, self._block_size)
        logits, states = (np.array(each, dtype=np.int32) for each in (logits_rows, state_rows))
        return StepBatch(np.array(ids, dtype=np.int32), attention, picked.adapters, logits, states)

    def columns(self, rows: Sequence[ScheduledRow], places: Sequence[int]) -> SamplingColumns:
        """Return how rows of the batch that was built last are sampled; ``places``: which row of its logits each is."""
        numbers = [self._places[row.sequence.number].number for row in rows]
        if numbers != self._drawn:
            self._drawn, self._drawn_kept = numbers, self._sampling[numbers]
        states = [row.sequence.text.sampler for row in rows]
        return columns_from(self._drawn_kept, np.array(places, dtype=np.int32), states)

    def _pick(self, places: list[int], rows: Sequence[ScheduledRow]) -> _Picked:
        keys = [row.sequence.stages.at(row.start) for row in rows]
        ranges = [self._ranges(adapter_id) for key in keys for adapter_id, _ in key]
        last = self._picked
        same = last is not None and last.places == places and last.keys == keys
        if last is not None and same and all(map(operator.is_, last.ranges, ranges)):
            return last
        self._forget_those_over()
        of_rows = iter(ranges)
        adapters = StepAdapters.of_rows([tuple((next(of_rows), weight) for _, weight in key) for key in keys])
        every = np.arange(len(places) + 1, dtype=np.int32)
        index = np.array(places, dtype=np.int32)
        self._picked = _Picked(places, index, keys, every, ranges, adapters)
        return self._picked

    def _place(self, stream: Stream) -> _Place:
        place = self._places.get(stream.number)
        table = self._table(stream.number)
        if place is None or place.table is not table:
            place = self._begin(stream, table, place)
        if place.filled != len(table):
            self._widen(len(table))
            self._tables[place.number, place.filled : len(table)] = table[place.filled :]
            place.filled = len(table)
        return place

    def _begin(self, stream: Stream, table: "array[int]", before: _Place | None) -> _Place:
        """Give a sequence its place, its table empty."""
        number = self._free_place() if before is None else before.number
        place = self._places[stream.number] = _Place(number, stream, table, 0)
        self._tables[number] = NULL_BLOCK
        row = SamplingRow(stream.owner.request.sampling, stream.text.sampler)
        self._sampling[number] = kept_of(row, self._vocab_size)
        self._picked = self._drawn = None
        return place

    def _free_place(self) -> int:
        if not self._free:
            self._forget_those_over()
        if not self._free:
            count = len(self._sampling)
            more = max(FIRST_PLACES, count)
            empty = np.full((more, self._tables.shape[1]), NULL_BLOCK, dtype=np.int32)
            self._tables = np.concatenate((self._tables, empty))
            self._sampling = np.concatenate((self._sampling, np.zeros(more, dtype=KEPT)))
            self._free += range(count, count + more)
        return self._free.pop()

    def _forget_those_over(self) -> None:
        over = [key for key, each in self._places.items() if each.stream.status is not SequenceStatus.RUNNING]
        self._free += [self._places.pop(key).number for key in over]

    def _widen(self, blocks: int) -> None:
        width = self._tables.shape[1]
        if blocks > width:
            more = max(width, blocks - width)
            empty = np.full((len(self._tables), more), NULL_BLOCK, dtype=np.int32)
            self._tables = np.concatenate((self._tables, empty), axis=1)
