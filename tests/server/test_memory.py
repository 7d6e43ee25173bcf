"""What libraries keep is bounded: kernels that are compiled for each number of rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manylora.serve import StartError, serve
from manylora.server.config import ServeSettings
from manylora.server.memory import KERNELS

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MANY_ROWS = """
import psutil, torch
from manylora.server.memory import keep_few_kernels

keep_few_kernels()
torch.set_num_threads(1)
weight = torch.randn(384, 128).bfloat16()
torch.nn.functional.linear(torch.randn(900, 128).bfloat16(), weight)
before = psutil.Process().memory_info().rss
for rows in range(20, 620):
    torch.nn.functional.linear(torch.randn(rows, 128).bfloat16(), weight)
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def test_many_shapes_take_little_more_than_a_few() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", MANY_ROWS], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200, "MiB; several times that where every shape is kept"


def test_a_server_bounds_them_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAPACITIES[0], "7")  # somebody's own
    monkeypatch.setenv(CAPACITIES[1], "")
    monkeypatch.delenv(CAPACITIES[1])
    with pytest.raises(StartError):
        serve(ServeSettings(base=str(tmp_path / "none"), data_dir=tmp_path, port=0))
    assert [os.environ[name] for name in CAPACITIES] == ["7", str(KERNELS)]
