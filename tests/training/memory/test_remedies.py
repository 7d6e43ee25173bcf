"""What gets a run in: the smallest change of its results first, and examples cut last and least."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.training.errors import InvalidArgument
from manylora.training.memory.plan import GIB, plan
from manylora.training.memory.remedies import remedies, smallest
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape
from tests.training.memory.test_shape import FIRST_QWEN_7B, QWEN25_7B_CONFIG

MODEL = ModelShape.from_config(FIRST_QWEN_7B)
RUN = RunShape(seq=1024, batch=4, accumulation=8)
QWEN25_7B = ModelShape.from_config(QWEN25_7B_CONFIG)


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
    order = ("eval_batch", "batch", "checkpointing", "qlora", "double_quant")
    for budget in (60, 46, 30, 20, 12):
        costs = [sum(1 << order.index(name) for name in each) for each in changes(budget)]
        assert costs == sorted(costs)


def test_examples_are_cut_only_where_nothing_else_is_enough_and_with_all_else_done() -> None:
    """4,096 tokens by 4 into 16 GiB: at a micro-batch of one most of each example stays."""
    run = RunShape(seq=4096, batch=4)
    (only,) = remedies(QWEN25_7B, run, 16 * GIB)
    assert only.changes == ("batch", "checkpointing", "qlora", "double_quant", "seq")
    assert only.run.seq >= 3584
    assert (only.run.batch, only.run.global_batch, only.run.method) == (1, 4, "qlora")
    assert only.flags.endswith(f"--model_max_length {only.run.seq}")
    assert not any("seq" in each.changes for each in remedies(QWEN25_7B, run, 18 * GIB))


def test_no_example_is_cut_where_that_is_not_allowed_or_below_what_is() -> None:
    run = RunShape(seq=4096, batch=4)
    assert remedies(QWEN25_7B, run, 16 * GIB, shortest=None) == ()
    assert remedies(QWEN25_7B, run, 16 * GIB, shortest=4000) == ()
    (least,) = remedies(QWEN25_7B, run, 16 * GIB)
    (same,) = remedies(QWEN25_7B, run, 16 * GIB, shortest=least.run.seq)
    assert same == least


def test_an_evaluation_batch_is_made_smaller_before_anything_else() -> None:
    run = replace(RUN, gradient_checkpointing=True, eval_seq=8192, eval_batch=32)
    budget = int(plan(MODEL, replace(run, eval_batch=4)).total_gib * GIB) + 1
    first = remedies(MODEL, run, budget)[0]
    assert first.changes == ("eval_batch",)
    assert first.run == replace(run, eval_batch=4)
    assert first.flags == "--per_device_eval_batch_size 4"


def test_held_out_examples_are_cut_with_the_others() -> None:
    run = RunShape(
        "qlora", 2048, double_quant=True, gradient_checkpointing=True, eval_seq=30000, eval_batch=1
    )
    budget = int(plan(MODEL, replace(run, eval_seq=16384)).total_gib * GIB) + 1
    (only,) = remedies(MODEL, run, budget)
    assert only.changes == ("seq",)
    assert (only.run.seq, only.run.eval_seq) == (2048, 16384)
    assert only.flags == "--model_max_length 16384"


def test_scales_are_quantised_before_an_example_is_cut() -> None:
    run = RunShape(seq=4096, gradient_checkpointing=True)
    scales = plan(QWEN25_7B, replace(run, method="qlora", double_quant=True)).total_gib
    four_bits = plan(QWEN25_7B, replace(run, method="qlora")).total_gib
    values = QWEN25_7B.layer_parameters
    assert (four_bits - scales) * GIB == pytest.approx(values * (32 / 64 - 8 / 64 - 32 / (64 * 256)) / 8)
    (only,) = remedies(QWEN25_7B, run, int((scales + four_bits) / 2 * GIB))
    assert only.changes == ("qlora", "double_quant")
    assert only.flags == "--q_lora --double_quant"
    assert only.total_gib == pytest.approx(scales)
    (only,) = remedies(QWEN25_7B, replace(run, method="qlora"), int((scales + four_bits) / 2 * GIB))
    assert only.changes == ("double_quant",)
    (only,) = remedies(QWEN25_7B, run, int((four_bits + 0.01) * GIB))
    assert only.changes == ("qlora",), "and not where 4 bits are enough"


@pytest.mark.parametrize("stored", ["nf4", "gptq"])
def test_what_a_base_is_stored_in_stays(stored: str) -> None:
    base = replace(QWEN25_7B, quantization=stored)
    found = remedies(base, RunShape(seq=4096, batch=4), 18 * GIB)
    assert found
    assert not {"qlora", "double_quant"} & {name for each in found for name in each.changes}


def test_what_is_already_done_is_not_offered() -> None:
    done = replace(RUN, gradient_checkpointing=True, method="qlora", batch=1, double_quant=True)
    assert changes(plan(MODEL, done).total_gib - 0.5, done) == [("seq",)]


def test_nothing_is_offered_where_nothing_helps() -> None:
    assert changes(2) == []
    assert plan(MODEL, smallest(MODEL, RUN)).total_gib > 2


@settings(deadline=None)
@given(
    budget=st.floats(5, 200),
    batch=st.integers(1, 12),
    accumulation=st.integers(1, 12),
    seq=st.integers(64, 8192),
    checkpointing=st.booleans(),
    method=st.sampled_from(["lora", "qlora"]),
    dora=st.booleans(),
)
def test_every_remedy_fits_and_only_changes_what_it_says(
    budget: float, batch: int, accumulation: int, seq: int, checkpointing: bool, method: str, dora: bool
) -> None:
    run = RunShape(method, seq, batch, accumulation, gradient_checkpointing=checkpointing, use_dora=dora)
    for each in remedies(MODEL, run, int(budget * GIB)):
        assert plan(MODEL, each.run).total_gib == each.total_gib <= budget
        assert each.run.global_batch == run.global_batch
        assert ("batch" in each.changes) == (each.run.batch < run.batch)
        assert ("eval_batch" in each.changes) == (each.run.eval_batch < run.eval_batch)
        assert ("seq" in each.changes) == (each.run.seq < run.seq)
        assert ("qlora" in each.changes) == (each.run.method != run.method)
        assert ("double_quant" in each.changes) == (each.run.double_quant != run.double_quant)
        assert ("checkpointing" in each.changes) == (
            each.run.gradient_checkpointing != run.gradient_checkpointing
        )
        same = (
            "rank",
            "use_dora",
            "targets",
            "optim",
            "dtype",
            "dropout",
            "rank_pattern",
            "starts_from_base",
        )
        assert all(getattr(each.run, name) == getattr(run, name) for name in same)


Harm = tuple[int, bool, bool, bool, int, int]


def harm(run: RunShape, after: RunShape) -> Harm:
    """How far each change goes, the dearest first; of batches, by how much they are smaller."""
    return (
        run.longest - after.longest,
        after.double_quant != run.double_quant,
        after.method != run.method,
        after.gradient_checkpointing != run.gradient_checkpointing,
        run.batch - after.batch,
        run.eval_batch - after.eval_batch,
    )


def dominates(one: Harm, other: Harm) -> bool:
    """Whether one changes nothing more than the other, and something less."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def uncut(run: RunShape) -> Iterator[RunShape]:
    """Yield the run with every combination of the changes that leave its examples alone."""
    divisors = [each for each in range(1, run.batch + 1) if run.global_batch % each == 0]
    halves = [run.eval_batch >> times for times in range(run.eval_batch.bit_length())]
    held = {(run.method, run.double_quant), ("qlora", run.double_quant), ("qlora", True)}
    for batch, eval_batch, checkpointing, (method, double_quant) in product(
        divisors, halves, {run.gradient_checkpointing, True}, held
    ):
        yield replace(
            run,
            batch=batch,
            accumulation=run.global_batch // batch,
            eval_batch=eval_batch,
            gradient_checkpointing=checkpointing,
            method=method,
            double_quant=double_quant,
        )


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(-0.3, 1),
    batch=st.integers(1, 8),
    accumulation=st.integers(1, 4),
    seq=st.integers(64, 8192),
    eval_seq=st.sampled_from([0, 512, 8192]),
    eval_batch=st.integers(1, 4),
    held=st.sampled_from([("lora", False), ("qlora", False), ("qlora", True)]),
    kind=st.sampled_from(
        [{}, {"use_dora": True}, {"starts_from_base": True}, {"rank_pattern": (("up_proj", 300),)}]
    ),
)
def test_no_remedy_is_dominated_and_examples_are_cut_last_and_least(
    share: float,
    batch: int,
    accumulation: int,
    seq: int,
    eval_seq: int,
    eval_batch: int,
    held: tuple[str, bool],
    kind: dict[str, Any],
) -> None:
    """By another that is offered, or by any that would fit."""
    method, double_quant = held
    run = RunShape(method, seq, batch, accumulation, eval_seq=eval_seq, eval_batch=eval_batch, **kind)
    run = replace(run, double_quant=double_quant)
    # Between what all changes leave and what the run takes; below that examples have to be cut.
    sizes = [plan(QWEN25_7B, each).total_gib for each in uncut(run)]
    budget = int((min(sizes) + share * (max(sizes) - min(sizes) if share > 0 else min(sizes))) * GIB)
    found = remedies(QWEN25_7B, run, budget)
    harms = [harm(run, each.run) for each in found]
    assert len(set(harms)) == len(harms)
    cuts = {each[0] for each in harms}
    assert len(cuts) <= 1, "all are cut alike, or none is"
    for cut in cuts:
        longest = run.longest - cut
        here = replace(run, seq=min(seq, longest), eval_seq=min(eval_seq, longest))
        fitting = [each for each in uncut(here) if plan(QWEN25_7B, each).total_gib * GIB <= budget]
        assert not [mine for mine in harms if any(dominates(harm(run, each), mine) for each in fitting)]
        for length in {run.longest, (run.longest + longest) // 2, longest + 8} if cut else ():
            if longest + 8 <= length:
                longer = replace(run, seq=min(seq, length), eval_seq=min(eval_seq, length))
                assert all(plan(QWEN25_7B, each).total_gib * GIB > budget for each in uncut(longer))


def test_a_length_that_nobody_has_is_cut_in_few_steps() -> None:
    """Every 64th length of 10^12 tokens would take weeks."""
    run = RunShape(seq=10**12, batch=1_000_000)
    for each in remedies(QWEN25_7B, run, 16 * GIB):
        assert each.total_gib <= 16 < plan(QWEN25_7B, replace(each.run, seq=each.run.seq + 8)).total_gib


@settings(deadline=None)
@given(seq=st.integers(64, 4096), batch=st.integers(1, 8), rank=st.sampled_from([8, 64]))
def test_the_plan_grows_with_what_is_asked_for(seq: int, batch: int, rank: int) -> None:
    run = RunShape(seq=seq, batch=batch, rank=rank)
    here = plan(MODEL, run).total_gib
    assert plan(MODEL, replace(run, seq=seq + 64)).total_gib >= here
    assert plan(MODEL, replace(run, batch=batch + 1)).total_gib >= here
    assert plan(MODEL, replace(run, rank=2 * rank)).total_gib > here
    assert plan(MODEL, replace(run, gradient_checkpointing=True)).total_gib <= here
    assert plan(MODEL, replace(run, method="qlora")).total_gib < here


@pytest.mark.parametrize("name", ["batch", "accumulation", "eval_batch"])
def test_a_number_of_rows_that_is_a_slip_is_refused(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(InvalidArgument, match=f"{flag} is 1000001, expected at most 1,000,000"):
        RunShape(**{name: 1_000_001})  # type: ignore[arg-type]
