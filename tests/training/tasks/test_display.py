"""What a run of several tasks shows on a terminal, however narrow."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from manylora.training.tasks.display import TasksDisplay
from tests.training.loop.making import items, tiny_base
from tests.training.tasks.making import Spec, team


@pytest.mark.parametrize("width", [60, 80, 110])
def test_no_heading_and_no_number_is_cropped(tmp_path: Path, width: int) -> None:
    run = team(tiny_base(tmp_path), tmp_path, [Spec(items(8), {}), Spec(items(8), {"max_steps": 1200})])
    run.members[1].name = "customer-support/german"
    written = io.StringIO()
    display = TasksDisplay(
        live=True, console=Console(file=written, force_terminal=True, width=width, color_system=None)
    )
    display.begin(run)
    for member in run.members:
        member.state.global_step = 1000
        values = {"loss": 0.67891, "learning_rate": 2e-4, "grad_norm": 12.345, "eval_loss": 0.5678}
        display.logged(member, values)
    display.close()
    last = written.getvalue().rsplit("╭─ training", 1)[1]
    assert "…" not in last
    for heading in ("task", "step", "epoch", "rank", "loss", "rate", "norm", "eval"):
        assert re.search(rf"\b{heading}\b", last)
    for value in ("1000/1200", "0.6789", "2.00e-04", "12.35", "0.5678"):
        assert value in last
