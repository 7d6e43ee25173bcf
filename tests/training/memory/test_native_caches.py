"""What native libraries keep for each shape doesn't grow with the lengths that a run meets."""

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from manylora.quant.native_caches import CAPACITIES
from manylora.training.bases.types import Base
from manylora.training.errors import TrainingError
from manylora.training.evaluate.generate import Generate
from manylora.training.memory.native_caches import MOST_OF_TASKS
from manylora.training.parsing import parse_arguments
from manylora.training.rate.run_sweep import run_sweep
from manylora.training.rate.sweep import SweepSettings
from manylora.training.run import Surroundings, train

MANY_LENGTHS = """
import psutil, torch
from manylora.training.memory.native_caches import keep_native_caches_small

keep_native_caches_small()
torch.set_num_threads(1)
weight, factor = torch.randn(384, 128).bfloat16(), torch.randn(64, 128, requires_grad=True)

def step(length):
    x = torch.randn(length, 128).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.linear(x, weight).sum() + torch.nn.functional.linear(x, factor).sum()
    y.backward()

step(400)
before = psutil.Process().memory_info().rss
for length in range(20, 360, 3):
    step(length)
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def test_a_hundred_lengths_take_little_more_than_one() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", MANY_LENGTHS], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 110, "MiB; several times that where every shape is kept"


@pytest.mark.parametrize("tasks", [False, True])
def test_a_run_limits_them_before_it_computes(
    tasks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CAPACITIES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    words = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "none")]
    words += ["--tasks", str(tmp_path / "none.yaml")] if tasks else ["--use_lora", "--data_path", "none.json"]
    with pytest.raises(TrainingError):
        train(parse_arguments(words), Surroundings(lambda _: None, _nobody))
    assert [int(os.environ[name]) == MOST_OF_TASKS for name in CAPACITIES] == [tasks, tasks]


def test_a_sweep_limits_them_and_a_setting_of_the_users_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = CAPACITIES
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "")
    monkeypatch.delenv(second)
    words = ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "none")]
    with pytest.raises(TrainingError):
        run_sweep(
            parse_arguments([*words, "--use_lora", "--data_path", "none.json"]),
            SweepSettings(),
            lambda _: None,
        )
    assert os.environ[first] == "7"
    assert int(os.environ[second]) < MOST_OF_TASKS


def _nobody(_: Base) -> AbstractContextManager[Generate]:
    raise AssertionError("nobody is asked")
