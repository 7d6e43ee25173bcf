"""The search on a tiny base: it ends with a rate, and leaves no trace."""

import io
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from manylora import demo
from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.errors import Diverged, InvalidArgument
from manylora.training.job import Job, total_steps
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.loop.watch import GuardSettings
from manylora.training.output import alone
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import prepare
from manylora.training.rate.curve import Curve
from manylora.training.rate.find import (
    Choice,
    _choose,
    apply,
    find_learning_rate,
    for_search,
    halving_steps,
    write_choice,
)
from manylora.training.rate.plot import plot_choice
from manylora.training.rate.progress import SearchProgress
from manylora.training.rate.run_sweep import run_sweep, table_of
from manylora.training.rate.sweep import (
    Result,
    Sweep,
    SweepSettings,
    parse_sweep,
    sweep,
    sweep_parser,
    write_sweep,
)
from manylora.training.rate.trials import WARMUP, Trial, halving, range_test, trial
from manylora.training.report.figures import tiles
from manylora.training.report.page import search_chart
from manylora.training.report.panel import clock
from manylora.training.report.record import BaseFacts, Results, RunRecord
from manylora.training.report.surroundings import this_machine

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


def tiny_record() -> RunRecord:
    return RunRecord(
        name="mine",
        outcome="finished",
        command=(),
        arguments={},
        versions={},
        seeds={},
        machine=this_machine(),
        base=BaseFacts("tiny", "dense", "float32", "0"),
        results=Results(train_seconds=100.0, steps=40),
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
    # The cost is said before anything runs, and counted as it was.
    most = 12 + WARMUP + halving_steps(5, 4)
    assert f"up to {most} trial steps before the 40 of the run" in said[0]
    assert f"{1 + most / 40:.1f} times as long" in said[0]
    assert 12 + WARMUP < choice.steps <= most
    assert choice.seconds > 0


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


def test_the_cost_of_halving_is_that_of_its_trials() -> None:
    for candidates, steps in ((5, 10), (3, 7), (9, 4)):
        run = [0]

        def count(rate: float, length: int, run: list[int] = run) -> Trial:
            run[0] += length
            return Trial(rate, length, rate)

        list(halving(tuple(map(float, range(candidates))), steps, count))
        assert run[0] == halving_steps(candidates, steps)


def test_a_search_without_a_terminal_says_now_and_then_how_far_it_is() -> None:
    said: list[str] = []
    time = [0.0]
    console = Console(file=io.StringIO(), force_terminal=False)
    state, control = TrainerState(), TrainerControl()
    with SearchProgress(10, said.append, console=console, now=lambda: time[0]) as progress:
        for _ in range(7):
            time[0] += 4.0
            progress.on_step_end(TrainingArguments("unused", use_cpu=True), state, control)
    assert said == [
        "looking for a learning rate: trial step 3 of at most 10, 0:28 left",
        "looking for a learning rate: trial step 6 of at most 10, 0:16 left",
    ]


def test_a_report_counts_the_search_and_draws_it_over_logarithmic_axes() -> None:
    curve = Curve((1e-5, 1e-4, 1e-3), (2.0, 0.02, 3.0))
    trials = (
        Trial(1e-4, 10, 0.1),
        Trial(2e-4, 10, 0.01),
        Trial(4e-4, 10, 0.001),
        Trial(9e-4, 10, math.inf),
        Trial(4e-4, 20, 0.0005),
    )
    facts = Choice(4e-4, "why", curve, trials, steps=615, seconds=200.0).facts()
    record = replace(tiny_record(), search=facts)
    time = next(tile for tile in tiles(record) if tile.name == "time")
    assert time.value == clock(300.0)
    assert time.note == f"40 steps; {clock(200.0)} of it for the rate (615 steps)"
    chart = str(search_chart(record))
    assert "Held-out loss by learning rate (logarithmic)" in chart
    assert "chosen: 0.0004" in chart
    # Equal ratios lie equally far apart, in both directions; what fell apart has no place.
    marks = re.findall(r'cx="(\S+)" cy="(\S+)".*?<title>10 steps at learning rate', chart)
    (x1, y1), (x2, y2), (x3, y3) = (tuple(map(float, mark)) for mark in marks)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) != 0
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2) != 0
    assert search_chart(tiny_record()) == ""


class Rates(TrainerCallback):
    """Keeps the rates that all groups took every step at."""

    def __init__(self) -> None:
        self.of_steps: list[list[float]] = []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        self.of_steps.append([group["lr"] for group in named["optimizer"].param_groups])


def test_a_range_test_keeps_the_ratio_of_lora_plus_and_is_let_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Noted(LoraTrainer):
        def start_watching(self, settings: GuardSettings) -> None:
            asked.append(settings.looks)
            super().start_watching(settings)

    monkeypatch.setattr("manylora.training.job.LoraTrainer", Noted)
    job = for_search(make_job(tmp_path, "--loraplus_lr_ratio 16"))
    rates = Rates()
    job.watchers = (rates,)
    range_test(job, 4)
    assert {round(max(each) / min(each), 6) for each in rates.of_steps} == {16.0}
    assert asked == [False]


def test_a_trial_that_falls_apart_ends_there_whatever_the_run_does_then(tmp_path: Path) -> None:
    job = for_search(make_job(tmp_path, "--guard off --on_divergence backoff"))
    rates = Rates()
    job.watchers = (rates,)
    found = trial(job, 3.0, 40)
    assert math.isinf(found.loss)
    assert len(rates.of_steps) < 40


def test_a_sweep_is_the_same_each_time_and_warms_up_over_its_share_of_the_steps(tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        job = make_job(tmp_path, f"--eval_data_path {tmp_path / 'sql-eval.json'} --lora_dropout 0.5")
        torch.manual_seed(seed)
        rates = Rates()
        job.watchers = (rates,)
        swept = sweep(job, SweepSettings(trials=2, ranks=(2, 4), warmups=(0.5,), steps=8), lambda _: None)
        found.append((swept.results, rates.of_steps))
    assert found[0] == found[1]
    first = [rate for rate, *_ in found[0][1][:8]]
    assert first[:4] == sorted(first[:4])
    assert first[0] < first[3] / 2


def test_the_files_plot_has_logarithmic_axes() -> None:
    choice = Choice(
        1e-4, "why", Curve((1e-5, 1e-4), (2.0, 0.02)), (Trial(1e-4, 10, 1e-3), Trial(2e-4, 10, math.inf))
    )
    plot = plot_choice(choice)
    assert plot.count('id="axes_') == 1
    texts = re.findall(r"<!-- (.*?) -->", plot)
    assert {"0.001", "0.01", "0.1", "1"} <= set(texts)


def test_a_sweep_tries_ranks_and_rates_and_writes_table_and_plot(tmp_path: Path) -> None:
    job = make_job(tmp_path, f"--eval_data_path {tmp_path / 'sql-eval.json'}")
    settings, rest = parse_sweep(
        ["--sweep_trials", "4", "--sweep_ranks=2,4", "--sweep_steps", "8", "--lora_r", "4"]
    )
    assert rest == ["--lora_r", "4"]
    found = sweep(job, settings, lambda _: None)
    assert len(found.results) == 4
    assert {each.rank for each in found.results} <= {2, 4}
    # alpha keeps its ratio to the rank that was asked for
    assert all(each.alpha == each.rank * 16 / 4 for each in found.results)
    assert found.best.steps == 8
    assert table_of(found).row_count == 4
    write_sweep(found, tmp_path)
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def result(number: int, loss: float, *, stopped: bool = False) -> Result:
    return Result(number, 1e-3, 8, 16, 0.0, 5 if stopped else 20, loss, stopped)


def test_the_best_of_a_sweep_ran_to_its_end() -> None:
    """What was stopped early may have been the lowest just then; what fell apart has no loss."""
    found = Sweep(
        (result(0, 0.5, stopped=True), result(1, 0.9), result(2, 0.8), result(3, math.inf), result(4, 1.2))
    )
    assert found.best.number == 2
    table = table_of(found)
    assert list(table.columns[-1].cells)[:1] == ["best"]
    assert list(table.columns[-1].cells).count("best") == 1


def test_a_sweep_without_a_whole_trial_has_no_best(tmp_path: Path) -> None:
    found = Sweep((result(0, 0.5, stopped=True), result(1, math.inf)))
    with pytest.raises(Diverged, match="no trial"):
        _ = found.best
    write_sweep(found, tmp_path)
    assert '"best": null' in (tmp_path / "sweep.json").read_text()
    assert table_of(found).row_count == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank_schedule 4:0,8:0.5", "--rank_schedule 4:0,8:0.5"),
        ("--from_adapter other", "--from_adapter"),
        ("--resume", "--resume"),
        ("--register http://127.0.0.1:9", "--register"),
        ("--auto_fit", "--auto_fit"),
        ("--eval_share 0.1 --eval_answers exact", "--eval_answers"),
        ("--lr_scheduler_type constant", "no warm-up"),
    ],
)
def test_a_sweep_refuses_what_it_would_leave_out(words: str, message: str) -> None:
    least = "--data_path none.json --output_dir out --use_lora"
    with pytest.raises(InvalidArgument, match=message):
        run_sweep(parse_arguments([*least.split(), *words.split()]), SweepSettings(), lambda _: None)


def test_a_sweep_leaves_a_directory_to_the_run_that_is_at_work_in_it(tmp_path: Path) -> None:
    arguments = parse_arguments(f"--data_path none.json --output_dir {tmp_path / 'out'} --use_lora".split())
    with alone(tmp_path / "out"), pytest.raises(InvalidArgument, match="another run is at work there"):
        run_sweep(arguments, SweepSettings(), lambda _: None)


def test_the_sweeps_help_has_its_flags() -> None:
    text = sweep_parser().format_help()
    for flag in ("--sweep_trials", "--sweep_steps", "--sweep_ranks", "--sweep_warmups", "--sweep_rates"):
        assert text.count(flag) == 1
    assert "manylora train --help" in text


@pytest.mark.parametrize("words", ["1e-4,1e-2", "1e-2,1e-4"])
def test_the_rates_of_a_sweep_are_taken_in_either_order(words: str) -> None:
    settings, _ = parse_sweep(["--sweep_rates", words])
    assert (settings.lowest, settings.highest) == (1e-4, 1e-2)


@pytest.mark.parametrize(
    "words",
    [
        "--sweep_trials none",
        "--sweep_ranks 0",
        "--sweep_rates 1e-4",
        "--sweep_rates 0,1e-4",
        "--sweep_rates 1e-4,inf",
        "--sweep_rates nan,1e-4",
        "--sweep_steps -5",
        "--sweep_warmups -0.1",
        "--sweep_warmups 0,10",
    ],
)
def test_a_sweep_of_nothing_is_refused(words: str) -> None:
    with pytest.raises(InvalidArgument, match="sweep"):
        parse_sweep(words.split())
