"""The guard's bar in its small form, and what it reads out of a run."""

import subprocess
import sys

from manylora.loadtest.divergence import outcome_of


def test_one_healthy_and_one_diverging_run_end_as_promised() -> None:
    words = [sys.executable, "-m", "manylora.loadtest.divergence", "--small"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 as promised" in done.stdout


def test_a_runs_outcome_is_read_from_its_record() -> None:
    events = [{"kind": "note"}, {"kind": "backoff"}, {"kind": "backoff"}]
    log = [{"eval_loss": 2.0}, {"loss": 1.0}, {"eval_loss": None}]
    found = outcome_of({"history": {"events": events, "log": log}}, stopped=False)
    assert found.was_caught
    assert found.guard == "2 steps back"
    assert found.shift == float("inf")
    calm = outcome_of(
        {"history": {"events": [], "log": [{"eval_loss": 2.0}, {"eval_loss": 1.5}]}}, stopped=False
    )
    assert (calm.was_caught, calm.shift) == (False, -0.5)
