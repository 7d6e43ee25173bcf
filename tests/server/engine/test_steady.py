"""A step of the same streams changes the arrays of the one before to what they would be if they were built anew."""

import numpy as np
import pytest

from manylora.server.engine.columns import columns_of
from manylora.server.engine.logits import SamplingRow
from manylora.server.engine.request import Pooling
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.steady import SPARE, SteadyStep
from manylora.server.engine.step_plan import ScheduledRow
from manylora.server.kernels.sampling import UNTOLD
from manylora.server.kernels.step import AttentionMetadata
from tests.server.engine.test_step_rows import BLOCK, VOCAB, Bench, ranges_at


def rows_of(*streams: Sequence) -> list[ScheduledRow]:
    return [
        ScheduledRow(s, s.num_computed_tokens, len(s.token_ids) - s.num_computed_tokens, True)
        for s in streams
    ]


def started(bench: Bench, *streams: Sequence) -> SteadyStep | None:
    for stream in streams:
        stream.told = UNTOLD
    bench.took(*streams)
    rows, places = rows_of(*streams), list(range(len(streams)))
    batch, columns = bench.rows.batch(rows, places), bench.rows.columns(rows, places)
    return SteadyStep.of(rows, batch, columns, bench.tables.__getitem__, bench.ranges.__getitem__, BLOCK)


def goes_on(bench: Bench, steady: SteadyStep | None, *streams: Sequence) -> bool:
    assert steady is not None
    return steady.goes_on(rows_of(*streams), bench.tables.__getitem__, bench.ranges.__getitem__)


def check(bench: Bench, steady: SteadyStep, *streams: Sequence) -> None:
    """Hold the step's arrays against those that lists of objects give."""
    rows = rows_of(*streams)
    tables = [bench.tables[s.number] for s in streams]
    right = AttentionMetadata.of_rows([r.start for r in rows], [1] * len(rows), tables, BLOCK)
    found = steady.batch.attention
    for name in ("positions", "slots", "query_start", "context_lens"):
        assert np.array_equal(getattr(found, name), getattr(right, name)), name
    width = right.block_tables.shape[1]
    assert np.array_equal(found.block_tables[:, :width], right.block_tables)
    assert not found.block_tables[:, width:].any()
    assert steady.batch.token_ids.tolist() == [
        s.token_ids[r.start] for r, s in zip(rows, streams, strict=True)
    ]
    states = [SamplingRow(s.owner.request.sampling, s.text.sampler) for s in streams]
    columns = columns_of(states, VOCAB)
    assert steady.columns.position.tolist() == columns.position.tolist()
    assert steady.columns.seed.tolist() == columns.seed.tolist()


def test_the_arrays_are_those_of_a_new_batch() -> None:
    bench = Bench()
    streams = bench.begin(1, 3), bench.begin(2, 9, ((1, 1.0),)), bench.begin(3, 4, ((1, 0.5), (2, 1.0)))
    steady = started(bench, *streams)
    assert steady is not None
    batch, columns = steady.batch, steady.columns
    for _ in range(SPARE * BLOCK):
        bench.took(*streams)
        assert goes_on(bench, steady, *streams)
        check(bench, steady, *streams)
    assert steady.batch is batch, "what a backend has laid out for it stays good"
    assert steady.columns is columns


def test_another_step_is_not_taken_for_the_next() -> None:
    bench = Bench()
    one, two, three = bench.begin(1, 3), bench.begin(2, 9, ((1, 1.0),)), bench.begin(3, 4)
    steady = started(bench, one, two)
    bench.took(one, two)
    assert not goes_on(bench, steady, two, one)
    assert not goes_on(bench, steady, one)
    assert not goes_on(bench, steady, one, two, three)
    one.token_ids.append(5)  # forced, or a chunk of what is computed again
    assert not goes_on(bench, steady, one, two)
    one.token_ids.pop()
    assert steady is not None
    begins = [row._replace(samples=row.sequence is not one) for row in rows_of(one, two)]
    assert not steady.goes_on(begins, bench.tables.__getitem__, bench.ranges.__getitem__), (
        "a chunk of one token"
    )
    assert goes_on(bench, steady, one, two)


def test_moved_adapters_and_blocks_taken_away_make_another_step() -> None:
    bench = Bench()
    one, two = bench.begin(1, 6, ((2, 1.0),)), bench.begin(2, 6, ((1, 1.0),))
    steady = started(bench, one, two)
    bench.took(one, two)
    bench.ranges[1] = ranges_at(32)
    assert not goes_on(bench, steady, one, two)
    steady = started(bench, one, two)
    bench.took(one, two)
    one.preempt()
    bench.admit(one)
    one.num_computed_tokens = len(one.token_ids) - 1
    assert not goes_on(bench, steady, one, two)


def test_longer_tables_than_there_is_room_for_make_another_step() -> None:
    bench = Bench()
    one = bench.begin(1, 3)
    steady = started(bench, one)
    for _ in range((SPARE + 1) * BLOCK):
        bench.took(one)
        last = goes_on(bench, steady, one)
    assert not last


@pytest.mark.parametrize("more", ["told", "pooled", "prompt"])
def test_rows_with_more_to_them_are_not_steady(more: str) -> None:
    bench = Bench()
    one, two = bench.begin(1, 3), bench.begin(2, 3)
    one.told = two.told = UNTOLD
    bench.took(one, two)
    if more == "told":
        two.told = 0
    elif more == "pooled":
        two.pooling = Pooling.LAST
    else:
        two.token_ids.append(1)
        bench.grow(two)
    rows, places = rows_of(one, two), [0, 1]
    batch, columns = bench.rows.batch(rows, places), bench.rows.columns(rows, places)
    assert (
        SteadyStep.of(rows, batch, columns, bench.tables.__getitem__, bench.ranges.__getitem__, BLOCK) is None
    )
