"""A merge takes a few times the largest tensor, never the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manylora.loadtest.material.checkpoints import TINY, AdapterShape, BaseShape, write_adapter, write_base

MB = 1 << 20
LARGE = BaseShape("llama", 4096, 512, 1408, 16, 8, 8, 512, tied=False)
LARGEST = 4096 * 512 * 2
# Chunks in float32 (of 16 MiB: here whole matrices), the adapter's factors, logits and libraries' scratch.
SLACK = 40 * MB


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    roots = []
    for name, shape in (("small", TINY), ("large", LARGE)):
        root = tmp_path_factory.mktemp(name)
        write_base(root / "base", shape, dtype=torch.bfloat16, shard_bytes=30 * MB)
        write_adapter(root / "adapter", root / "base", AdapterShape(rank=8))
        roots.append(root)
    return roots[0], roots[1]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "into"), [("merged", "16bit"), ("merged-4bit", "dequantized")])
def test_peak_memory_is_three_times_the_largest_tensor(
    models: tuple[Path, Path], form: str, into: str
) -> None:
    small, large = models
    stored = sum(path.stat().st_size for path in (large / "base").glob("*.safetensors"))
    script = Path(__file__).with_name("merge_memory.py")
    done = subprocess.run(
        [sys.executable, script, small, large, form, into],
        cwd=script.parents[3],
        # The threshold makes malloc give back what is freed, so that resident memory is what is in use.
        env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    peak = json.loads(done.stdout)["peak"]
    print(f"\nstored {stored / MB:.0f} MB, largest {LARGEST / MB:.1f} MB, peak {peak / MB:.1f} MB")  # noqa: T201  # the result
    assert stored > 100 * MB
    assert peak <= 3 * LARGEST + SLACK
