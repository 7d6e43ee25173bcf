"""What libraries keep is bounded: kernels that are compiled for each number of rows."""

import os
import subprocess
import sys
from pathlib import Path

from manylora.quant.native_caches import CAPACITIES
from manylora.serve import KERNELS

MANY_ROWS = """
import psutil, torch
from manylora.quant.native_caches import keep_few_kernels

keep_few_kernels(128)
torch.set_num_threads(1)
weight = torch.randn(384, 128).bfloat16()
torch.nn.functional.linear(torch.randn(900, 128).bfloat16(), weight)
before = psutil.Process().memory_info().rss
for rows in range(20, 620):
    torch.nn.functional.linear(torch.randn(rows, 128).bfloat16(), weight)
print((psutil.Process().memory_info().rss - before) >> 20)
"""


BEFORE_IT_LOADS = """
import os, sys
from pathlib import Path
from manylora.serve import StartError, serve
from manylora.server.config import ServeSettings

try:
    serve(ServeSettings(base=sys.argv[1], data_dir=Path(sys.argv[1]), port=0))
except StartError:
    print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"])
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=inherited | own, capture_output=True, text=True, check=True)
    return done.stdout


def test_many_shapes_take_little_more_than_a_few() -> None:
    assert int(run(MANY_ROWS)) < 200, "MiB; several times that where every shape is kept"


def test_a_server_bounds_them_before_it_loads_anything(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    assert run(BEFORE_IT_LOADS, missing) == f"{KERNELS} {KERNELS}\n"
    # Somebody's own setting stays.
    assert run(BEFORE_IT_LOADS, missing, ONEDNN_PRIMITIVE_CACHE_CAPACITY="7") == f"7 {KERNELS}\n"
