"""Planning and fitting a prepared run."""

import json
from pathlib import Path

import pytest

from manylora.loadtest.checkpoints import TINY, write_base
from manylora.training.arguments import Arguments
from manylora.training.errors import DoesNotFit
from manylora.training.job import Job, total_steps
from manylora.training.memory.job import _change, fit_job, plan_job, shapes_of
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import Prepared, prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_base(tmp_path / "base", TINY)
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x" * n}]}
        for n in range(8, 60)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--model_name_or_path", str(tmp_path / "base"), "--data_path", str(tmp_path / "data.jsonl")),
        *("--output_dir", str(tmp_path / "out"), "--use_lora", "--use_cpu", "--model_max_length", "64"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--data_check", "off"),
        *("--rank_schedule", "4:0,16:0.5", "--auto_fit"),
    ]


def prepare_again(arguments: Arguments) -> Prepared:
    return prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)


def job_of(words: list[str]) -> Job:
    arguments = parse_arguments(words)
    return Job(arguments, prepare_again(arguments))


def test_sizes_are_the_runs_own(words: list[str]) -> None:
    job = job_of(words)
    model, run = shapes_of(job)
    assert model.parameters == sum(each.numel() for each in job.prepared.base.model.parameters()) - sum(
        each.numel() for name, each in job.prepared.model.named_parameters() if "lora_" in name
    )
    assert (run.rank, run.batch, run.accumulation, run.device) == (16, 4, 2, "cpu")
    assert run.seq == max(job.prepared.train.lengths)
    assert plan_job(job).total_gib > 0


def test_a_run_that_fits_is_left_as_it_is(words: list[str]) -> None:
    job = job_of([*words, "--memory", "64GiB"])
    said: list[str] = []
    fit_job(job, prepare_again, said.append)
    assert len(said) == 1
    assert "the longest batch took" in said[0]
    assert job.training_arguments().per_device_train_batch_size == 4


def test_what_can_not_fit_is_said(words: list[str]) -> None:
    job = job_of([*words, "--memory", "16MiB"])
    with pytest.raises(DoesNotFit, match="smaller base"):
        fit_job(job, prepare_again, lambda _: None)


def test_four_bits_and_another_length_prepare_anew(words: list[str]) -> None:
    from dataclasses import replace

    job = job_of(words)
    _, run = shapes_of(job)
    wanted = replace(run, method="qlora", seq=32, batch=2, accumulation=4, gradient_checkpointing=True)
    _change(job, run, wanted, prepare_again)
    _, changed = shapes_of(job)
    assert changed == wanted
    assert job.prepared.base.kind == "nf4"
    assert job.arguments.lora.q_lora
