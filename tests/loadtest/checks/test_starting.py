"""The check of starting: the demo's base twice, and which bars count."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manylora import demo
from manylora.loadtest.checks.starting import Bars, Resident, Start, missed, resident, starts, table
from manylora.server.kernels.choose import choose_backend

NATIVE = choose_backend(torch.device("cpu"), torch.bfloat16).keeper is not None


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_the_second_start_maps_the_weights(tmp_path: Path) -> None:
    base = Path(demo.__file__).parent / "base"
    first, second, after = starts(base, tmp_path, ("--kv-cache-gib", "0.1", "--arena-rows", "256"))
    assert first.resident.kept == 0
    assert after.resident.kept >= second.resident.kept > 0
    assert first.seconds is not None
    assert len(table([first, second, after]).splitlines()) == 5


def test_parts_add_up_to_what_the_kernel_counts() -> None:
    program = "print(len(bytes(range(256)) * (1 << 17)), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = resident(process.pid)
        process.kill()
    counted = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    assert found.kept == 0
    assert found.rest == pytest.approx(counted * 1024 / 1e6, rel=0.1)
    assert 0 < found.proportional <= found.rest


def start(name: str, seconds: float, rest: float) -> Start:
    return Start(name, seconds, Resident(300, rest - 100, 100, 500))


@pytest.mark.parametrize(
    ("bars", "told"),
    [
        (Bars(), None),
        (Bars(first=20, second=3, weights=350, rest=420), None),
        (Bars(first=19), "first start: 20.0 s, at most 19"),
        (Bars(second=2.9), "second start: 3.0 s, at most 2.9"),
        (Bars(weights=349), "weights: 350.0 MB, at most 349"),
        (Bars(rest=419), "all else: 420.0 MB, at most 419"),
    ],
)
def test_each_bar_counts(bars: Bars, told: str | None) -> None:
    found = [start("first start", 20, 800), start("second start", 3, 420)]
    faults = missed(found, 350, bars)
    assert len(faults) == (told is not None)
    assert told is None or faults[0].startswith(told)
