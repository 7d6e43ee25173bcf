"""What is kept of running sequences from step to step: the batch is the one that would be built anew."""

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
import pytest

from manylora.server.engine.activation import Stages
from manylora.server.engine.columns import columns_of
from manylora.server.engine.detokenizer import Detokenizer
from manylora.server.engine.logits import SamplerState, SamplingRow
from manylora.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from manylora.server.engine.sequence import LiveRequest, Sequence, TextState
from manylora.server.engine.step_plan import ScheduledRow
from manylora.server.engine.step_rows import FIRST_BLOCKS, FIRST_PLACES, StepRows
from manylora.server.engine.stop import StopChecker
from manylora.server.kernels.step import (
    LORA_MODULES,
    AdapterRanges,
    AttentionMetadata,
    RankRange,
    StepAdapters,
    StepBatch,
)
from tests.server.engine.fakes import Letters

BLOCK, VOCAB = 4, 64


def ranges_at(start: int) -> AdapterRanges:
    return dict.fromkeys(LORA_MODULES, RankRange(start, 4))


@dataclass
class Bench:
    """Block tables and adapters as an engine has them, and the rows that are kept of them."""

    tables: dict[int, "array[int]"] = field(default_factory=dict)
    ranges: dict[int, AdapterRanges] = field(default_factory=lambda: {1: ranges_at(0), 2: ranges_at(4)})
    blocks: int = 0

    def __post_init__(self) -> None:
        self.rows = StepRows(BLOCK, VOCAB, self.tables.__getitem__, self.ranges.__getitem__)

    def begin(self, number: int, prompt: int = 3, adapters: Items[tuple[int, float]] = ()) -> Sequence:
        params = SamplingParams(temperature=0.5 + number, top_k=number, seed=number, logprobs=number % 3)
        ids = tuple(range(prompt))
        request = GenerationRequest(f"r{number}", ids, params, tuple(adapters))
        live = LiveRequest(request, 1, Stages.throughout(request.adapters))
        text = TextState(
            SamplerState(params, ids),
            Detokenizer(Letters(), ids),
            StopChecker(params, frozenset()),
        )
        sequence = Sequence(number, 0, live, text)
        self.admit(sequence)
        return sequence

    def admit(self, sequence: Sequence) -> None:
        sequence.admit(0)
        self.tables[sequence.number] = array("i")
        self.grow(sequence)

    def grow(self, sequence: Sequence) -> None:
        table = self.tables[sequence.number]
        while len(table) * BLOCK < len(sequence.token_ids):
            self.blocks += 1
            table.append(self.blocks)

    def took(self, *sequences: Sequence) -> None:
        """Let each have one more token than it had."""
        for sequence in sequences:
            sequence.num_computed_tokens = len(sequence.token_ids)
            sequence.token_ids.append(sequence.number)
            sequence.text.sampler.append(sequence.number)
            self.grow(sequence)

    def check(self, *sequences: Sequence) -> StepBatch:
        """Hold the kept rows' batch and columns against those of a list of objects."""
        rows = [
            ScheduledRow(s, s.num_computed_tokens, len(s.token_ids) - s.num_computed_tokens, True)
            for s in sequences
        ]
        batch = self.rows.batch(rows, list(range(len(rows))))
        tables = [self.tables[s.number] for s in sequences]
        wanted = AttentionMetadata.of_rows([r.start for r in rows], [r.length for r in rows], tables, BLOCK)
        for name in ("positions", "slots", "query_start", "context_lens", "block_tables"):
            found, right = getattr(batch.attention, name), getattr(wanted, name)
            assert found.dtype == np.int32
            assert np.array_equal(found, right), name
        ids = [t for r in rows for t in r.sequence.token_ids[r.start : r.start + r.length]]
        assert batch.token_ids.tolist() == ids
        right = StepAdapters.of_rows(
            [tuple((self.ranges[i], weight) for i, weight in s.adapters) for s in sequences]
        )
        assert batch.adapters.ranges == right.ranges
        for name in ("start", "which", "weights"):
            assert np.array_equal(getattr(batch.adapters, name), getattr(right, name)), name
        self.check_columns(rows)
        return batch

    def check_columns(self, rows: list[ScheduledRow]) -> None:
        found = self.rows.columns(rows, list(range(len(rows))))
        states = [SamplingRow(r.sequence.owner.request.sampling, r.sequence.text.sampler) for r in rows]
        right = columns_of(states, VOCAB)
        for name in ("inverse_temperature", "top_k", "top_p", "min_p", "seed", "choice", "position", "told"):
            assert getattr(found, name).flags["C_CONTIGUOUS"]
            assert getattr(found, name).flags["ALIGNED"]  # native code reads them
            assert getattr(found, name).tolist() == getattr(right, name).tolist(), name


def test_rows_go_on_grow_and_change_places() -> None:
    bench = Bench()
    one, two = bench.begin(1, 3), bench.begin(2, 9, ((1, 1.0),))
    bench.check(one, two)
    for _ in range(3 * FIRST_BLOCKS * BLOCK):
        bench.took(one, two)
        bench.check(one, two)
    bench.check(two, one)
    bench.check(two)
    bench.took(two)
    bench.check(one, two)


@pytest.mark.parametrize("between", [True, False], ids=["others go on", "at once"])
def test_a_sequence_that_is_computed_again_has_its_new_blocks(between: bool) -> None:
    bench = Bench()
    one, two = bench.begin(1, 6), bench.begin(2, 6)
    bench.check(one, two)
    bench.took(one, two)
    bench.check(one, two)
    one.preempt()
    bench.took(two)
    if between:
        bench.check(two)
    bench.admit(one)
    # As a prefix that was found again leaves it: one token to compute, as if it had gone on.
    one.num_computed_tokens = len(one.token_ids) - 1
    bench.check(one, two)


def test_an_adapter_that_was_moved_is_where_it_is_now() -> None:
    bench = Bench()
    rows = bench.begin(1, adapters=((1, 1.0),)), bench.begin(2, adapters=((1, 0.5), (2, 0.25)))
    bench.check(*rows)
    bench.took(*rows)
    first = bench.check(*rows)
    bench.took(*rows)
    assert bench.check(*rows).adapters is first.adapters
    bench.ranges[1] = ranges_at(32)
    bench.took(*rows)
    bench.check(*rows)


@pytest.mark.parametrize("count", [3 * FIRST_PLACES])
def test_what_is_over_leaves_its_place_to_others(count: int) -> None:
    bench = Bench()
    stays = bench.begin(1)
    for number in range(2, count):
        other = bench.begin(number)
        bench.check(stays, other)
        bench.took(stays, other)
        bench.check(stays, other)
        other.finish(FinishReason.STOP)
        bench.took(stays)
        bench.check(stays)
        assert len(bench.rows) == 1
    many = [bench.begin(number) for number in range(count, 2 * count)]
    bench.check(stays, *many)


def test_who_takes_a_place_finds_nothing_there() -> None:
    bench = Bench()
    stays, gone = bench.begin(1, 60), bench.begin(2, 50)
    bench.check(stays, gone)
    gone.finish(FinishReason.STOP)
    bench.took(stays)
    # A step of which the engine samples itself asks for no columns.
    bench.rows.batch([ScheduledRow(stays, stays.num_computed_tokens, 1, True)], [0])
    assert len(bench.rows) == 1
    bench.took(stays)
    bench.check(stays, bench.begin(3, 2))
