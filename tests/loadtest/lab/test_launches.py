"""What the lab counts of a step: ops where they are asked for, and the lines that read the device."""

import sys

import pytest
import torch

from manylora.loadtest.lab import launches
from manylora.loadtest.lab.launches import Tally


def test_a_tally_counts_ops_that_are_no_views_and_lines_that_wait() -> None:
    tally = Tally()
    x = torch.ones(4)
    with tally, tally.host_calls():
        tally.of_part("twice", lambda: x.view(2, 2).add(1).mul_(2))()
        assert bool((x > 0).all())
        assert x.tolist() == [1, 1, 1, 1]
    assert tally.ops["twice"] == 2
    assert sorted(line.split(" at ")[0] for line in tally.waits) == [
        ".tolist()",
        "aten._local_scalar_dense.default",
    ]
    assert all("test_launches.py" in line for line in tally.waits)


def test_a_step_waits_nowhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--rows", "3", "--adapters", "2", "--rank", "4", "--context", "70"]
    monkeypatch.setattr(sys, "argv", ["launches", *arguments, "--quantization", "nf4"])
    launches.main()
    shown = capsys.readouterr().out
    assert "waits" not in shown
    decode, prefill = (
        next(line for line in shown.splitlines() if line.startswith(name)) for name in ("decode", "prefill")
    )
    assert float(decode.split()[1]) < float(prefill.split()[1])
