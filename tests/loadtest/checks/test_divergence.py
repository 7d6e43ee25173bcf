"""The guard's bar in its small form, and what it reads out of a run."""

import math
import subprocess
import sys

import pytest

from manylora.loadtest.checks.divergence import Outcome, outcome_of


@pytest.mark.timeout(900)
def test_one_healthy_and_one_diverging_run_end_as_promised() -> None:
    words = [sys.executable, "-m", "manylora.loadtest.checks.divergence", "--small"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 as promised" in done.stdout


def test_a_runs_outcome_is_read_from_its_record() -> None:
    events = [{"kind": "note"}, {"kind": "backoff"}, {"kind": "backoff"}]
    log = [{"eval_loss": 2.0}, {"loss": 1.0}, {"eval_loss": None}]
    worse = "The adapter is worse than the base alone: …"
    history = {"events": events, "log": log}
    found = outcome_of({"history": history, "outcome": f"finished; {worse}"}, worse, stopped=False)
    assert found.was_caught
    assert found.guard == "2 steps back; said to be worse than the base"
    for outcome, last in (("finished", worse), (worse, "Serve it: manylora serve base")):
        assert not outcome_of({"history": history, "outcome": outcome}, last, stopped=False).says_worse
    assert found.shift == float("inf")
    history = {"events": [], "log": [{"eval_loss": 2.0}, {"eval_loss": 1.5}]}
    calm = outcome_of({"history": history, "outcome": "finished"}, "Serve it: …", stopped=False)
    assert (calm.was_caught, calm.shift) == (False, -0.5)


@pytest.mark.parametrize(
    ("losses", "stopped", "says", "told"),
    [
        ((3.1, 4.4), False, True, True),
        ((3.1, 4.4), False, False, False),
        ((3.1, math.inf), False, False, False),
        ((3.1, 9.0), True, False, True),
        ((3.1, 0.4), False, False, True),
        ((3.1, 0.4), False, True, False),
        ((3.1, 3.2), False, False, True),
        ((3.1, 3.2), False, True, True),
    ],
)
def test_a_run_that_did_harm_has_to_say_so(
    losses: tuple[float, ...], stopped: bool, says: bool, told: bool
) -> None:
    assert Outcome(stopped, 1, losses, says).is_told == told
