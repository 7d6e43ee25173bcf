"""What gets a run in, cheapest first."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from manylora.training.memory.plan import GIB, plan
from manylora.training.memory.remedies import remedies, smallest
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape
from tests.training.memory.test_shape import FIRST_QWEN_7B

MODEL = ModelShape.from_config(FIRST_QWEN_7B)
RUN = RunShape(seq=1024, batch=4, accumulation=8)


def changes(budget_gib: float, run: RunShape = RUN) -> list[tuple[str, ...]]:
    return [each.changes for each in remedies(MODEL, run, int(budget_gib * GIB))]


def test_a_run_that_fits_needs_none() -> None:
    assert changes(80) == []


def test_the_smaller_micro_batch_comes_first_and_keeps_the_global_batch() -> None:
    (first, *_) = remedies(MODEL, RUN, 46 * GIB)
    assert first.changes == ("batch",)
    assert first.run.global_batch == RUN.global_batch
    assert first.run.batch == 3 or RUN.global_batch % 3  # the largest that divides it
    assert first.flags == (
        f"--per_device_train_batch_size {first.run.batch} --gradient_accumulation_steps {first.run.accumulation}"
    )


def test_one_change_is_not_offered_again_with_another() -> None:
    found = changes(30)
    assert not any(set(a) < set(b) for a in found for b in found)


def test_each_change_costs_more_than_all_cheaper_ones_together() -> None:
    assert changes(16.5)[0] == ("batch", "checkpointing", "qlora") or ("qlora",) in changes(16.5)
    order = ("batch", "checkpointing", "qlora", "seq")
    costs = [sum(1 << order.index(name) for name in each) for each in changes(20)]
    assert costs == sorted(costs)


def test_what_is_already_done_is_not_offered() -> None:
    done = replace(RUN, gradient_checkpointing=True, method="qlora", batch=1)
    assert changes(plan(MODEL, done).total_gib - 0.5, done) == [("seq",)]


def test_nothing_is_offered_where_nothing_helps() -> None:
    assert changes(2) == []
    assert plan(MODEL, smallest(MODEL, RUN)).total_gib > 2


@given(
    budget=st.floats(5, 200),
    batch=st.integers(1, 12),
    accumulation=st.integers(1, 12),
    seq=st.integers(64, 8192),
    checkpointing=st.booleans(),
)
def test_every_remedy_fits_and_only_changes_what_it_says(
    budget: float, batch: int, accumulation: int, seq: int, checkpointing: bool
) -> None:
    run = RunShape(seq=seq, batch=batch, accumulation=accumulation, gradient_checkpointing=checkpointing)
    for each in remedies(MODEL, run, int(budget * GIB)):
        assert plan(MODEL, each.run).total_gib == each.total_gib <= budget
        assert each.run.global_batch == run.global_batch
        assert ("batch" in each.changes) == (each.run.batch < run.batch)
        assert ("seq" in each.changes) == (each.run.seq < run.seq)
        assert ("qlora" in each.changes) == (each.run.method != run.method)
        assert ("checkpointing" in each.changes) == (
            each.run.gradient_checkpointing != run.gradient_checkpointing
        )


@given(seq=st.integers(64, 4096), batch=st.integers(1, 8), rank=st.sampled_from([8, 64]))
def test_the_plan_grows_with_what_is_asked_for(seq: int, batch: int, rank: int) -> None:
    run = RunShape(seq=seq, batch=batch, rank=rank)
    here = plan(MODEL, run).total_gib
    assert plan(MODEL, replace(run, seq=seq + 64)).total_gib >= here
    assert plan(MODEL, replace(run, batch=batch + 1)).total_gib >= here
    assert plan(MODEL, replace(run, rank=2 * rank)).total_gib > here
    assert plan(MODEL, replace(run, gradient_checkpointing=True)).total_gib <= here
    assert plan(MODEL, replace(run, method="qlora")).total_gib < here
