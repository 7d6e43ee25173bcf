"""What a job hands to its trainers, and how many steps it has."""

from pathlib import Path

import pytest

from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.job import Job, total_steps
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import prepare

EPOCH = "--num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"


def test_b_learns_at_the_ratio_that_was_asked_for(tmp_path: Path) -> None:
    write_tasks(tmp_path, 8, 2)
    write_base(tmp_path / "tiny", TINY)
    arguments = parse_arguments(
        f"--model_name_or_path {tmp_path / 'tiny'} --data_path {tmp_path / 'sql.json'} --output_dir"
        f" {tmp_path / 'out'} --use_lora --lora_r 4 --data_check off --max_steps 2 --learning_rate 1e-3"
        " --loraplus_lr_ratio 16".split()
    )
    prepared = prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)
    trainer = Job(arguments, prepared).trainer()
    names = {id(each): name for name, each in prepared.model.named_parameters()}
    rates = {
        names[id(each)].split(".")[-3]: group["lr"]
        for group in trainer.create_optimizer().param_groups
        for each in group["params"]
    }
    assert rates == {"lora_A": pytest.approx(1e-3), "lora_B": pytest.approx(16e-3)}


@pytest.mark.parametrize(("processes", "steps"), [(1, 6), (2, 3), (5, 2)])
def test_an_epoch_has_the_fewer_steps_the_more_processes_share_its_rows(
    monkeypatch: pytest.MonkeyPatch, processes: int, steps: int
) -> None:
    monkeypatch.setattr("manylora.training.job.world_size", lambda: processes)
    words = f"--data_path data.json --output_dir out --use_lora {EPOCH}"
    arguments = parse_arguments(words.split())
    assert total_steps(arguments.training, 24) == steps
