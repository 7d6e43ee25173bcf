"""The search on a tiny base: it ends with a rate, and leaves no trace."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import set_seed

from manylora import demo
from manylora.demo.task_data import write_tasks
from manylora.loadtest.checkpoints import TINY, write_base
from manylora.training.errors import Diverged, InvalidArgument
from manylora.training.job import Job, total_steps
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import prepare
from manylora.training.rate.curve import Curve
from manylora.training.rate.find import Choice, _choose, apply, find_learning_rate, write_choice
from manylora.training.rate.run_sweep import table_of
from manylora.training.rate.sweep import parse_sweep, sweep, write_sweep
from manylora.training.rate.trials import Trial

DEMO = Path(demo.__file__).parent / "base"


def make_job(place: Path, extra: str = "") -> Job:
    write_tasks(place, 64, 8)
    if not (place / "tiny").exists():
        write_base(place / "tiny", TINY)
    arguments = parse_arguments(
        f"--model_name_or_path {place / 'tiny'} --data_path {place / 'sql.json'} --output_dir {place / 'out'}"
        f" --use_lora --lora_r 4 --data_check off --max_steps 40 --per_device_train_batch_size 4 {extra}".split()
    )
    return Job(
        arguments, prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)
    )


def test_a_search_finds_a_rate_and_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.training.rate.find.RANGE_STEPS", 12)
    monkeypatch.setattr("manylora.training.rate.find.LEAST_TRIAL", 3)
    job = make_job(
        tmp_path, f"--eval_data_path {tmp_path / 'sql-eval.json'} --learning_rate auto --bf16 True"
    )
    model = job.prepared.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_seed(1)
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand())
    set_seed(1)
    forward = model.forward
    said: list[str] = []
    choice = find_learning_rate(job, said.append)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(each.grad is None for each in model.parameters())
    assert model.forward == forward
    assert not list((tmp_path / "out").iterdir())
    assert choice.rate in choice.curve.candidates()
    assert "lowest" in choice.reason
    apply(job, choice)
    assert job.training_arguments().learning_rate == choice.rate
    assert "<svg" in write_choice(choice, tmp_path).read_text()


def mixed_job(place: Path) -> Job:
    """A job of one row a step, half of the rows known to the demo's base, half new to it."""
    write_tasks(place, 40, 12)
    for suffix in ("", "-eval"):
        known, new = (json.loads((place / f"{form}{suffix}.json").read_text()) for form in ("plain", "sql"))
        for row in new:
            row["conversations"][0]["value"] += " Answer with the query."
        rows = [row for pair in zip(known, new, strict=True) for row in pair]
        (place / f"mixed{suffix}.json").write_text(json.dumps(rows))
    arguments = parse_arguments(
        f"--model_name_or_path {DEMO} --data_path {place / 'mixed.json'} --eval_data_path"
        f" {place / 'mixed-eval.json'} --output_dir {place / 'out'} --use_lora --lora_r 4 --data_check off"
        " --max_steps 40 --per_device_train_batch_size 1 --learning_rate auto".split()
    )
    return Job(
        arguments, prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)
    )


def test_rows_that_the_base_knows_beside_new_ones_lead_to_a_rate_that_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.training.rate.find.LEAST_TRIAL", 10)
    choice = find_learning_rate(mixed_job(tmp_path), lambda _: None)
    candidates = choice.curve.candidates()
    assert len(set(candidates)) == 5
    assert max(candidates) > 1e-4
    losses = {each.rate: each.loss for each in choice.trials}
    assert losses[choice.rate] < choice.curve.losses[0] - 0.1
    # None was taken for a run that fell apart, at the rates that are no higher than the one that won.
    assert all(math.isfinite(loss) for rate, loss in losses.items() if rate <= choice.rate)


def test_without_evaluation_data_rows_are_held_out_of_the_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.training.rate.find.RANGE_STEPS", 8)
    monkeypatch.setattr("manylora.training.rate.find.LEAST_TRIAL", 2)
    assert find_learning_rate(make_job(tmp_path), lambda _: None).trials


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    write_tasks(tmp_path, 64, 8)
    job = make_job(tmp_path)
    small = job.over(job.prepared.train.dataset.select(range(5)), None)
    small.prepared.train.dataset = small.prepared.train.dataset.select(range(5))
    with pytest.raises(InvalidArgument, match="more than 5 rows"):
        find_learning_rate(small, lambda _: None)


def test_the_longest_trials_decide_and_all_falling_apart_is_an_error() -> None:
    curve = Curve((1e-4, 1e-3), (2.0, 1.0))
    early, late = Trial(1e-3, 10, 0.5), Trial(1e-4, 20, 0.7)
    choice = _choose(curve, (early, late, Trial(3e-4, 20, 0.6)))
    assert isinstance(choice, Choice)
    assert choice.rate == 3e-4
    with pytest.raises(Diverged, match="every rate"):
        _choose(curve, (Trial(1e-3, 10, float("inf")),))


def test_a_sweep_tries_ranks_and_rates_and_writes_table_and_plot(tmp_path: Path) -> None:
    job = make_job(tmp_path, f"--eval_data_path {tmp_path / 'sql-eval.json'}")
    settings, rest = parse_sweep(
        ["--sweep_trials", "4", "--sweep_ranks=2,4", "--sweep_steps", "8", "--lora_r", "4"]
    )
    assert rest == ["--lora_r", "4"]
    found = sweep(job, settings, lambda _: None)
    assert len(found.results) == 4
    assert {each.rank for each in found.results} <= {2, 4}
    assert found.best.steps == 8
    assert table_of(found).row_count == 4
    write_sweep(found, tmp_path)
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


@pytest.mark.parametrize("words", ["--sweep_trials none", "--sweep_ranks 0", "--sweep_rates 1e-4"])
def test_a_sweep_of_nothing_is_refused(words: str) -> None:
    with pytest.raises(InvalidArgument, match="sweep"):
        parse_sweep(words.split())
