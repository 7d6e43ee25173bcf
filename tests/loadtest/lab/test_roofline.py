"""The table of the roofline has a line for each op of each step, and the whole."""

import subprocess
import sys

import pytest

from manylora.server.kernels.cpu.library import Unavailable, load_library


@pytest.mark.skipif(isinstance(load_library(), Unavailable), reason="there are no native kernels here")
def test_every_op_of_every_step_has_its_line() -> None:
    words = [sys.executable, "-m", "manylora.loadtest.lab.roofline", "--model", "tiny", "--rows", "1", "3"]
    done = subprocess.run(
        [*words, "--context", "20", "--repeats", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len({row[0] for row in rows}) == 5
    assert len(rows) == 5 * 7
    assert all(float(row[5]) > 0 for row in rows)
    assert [row[1] for row in rows[:7]] == [
        *("attn_in", "attend", "attn_out", "mlp_in", "mlp_out", "head", "**whole step**")
    ]


def test_a_level_that_is_not_there_is_one_line() -> None:
    words = [sys.executable, "-m", "manylora.loadtest.lab.roofline", "--level", "mmx"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
