"""`--learning_rate auto`: a range test bounds the rates, a short halving on held-out loss chooses one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from manylora.training.distributed import is_first_process
from manylora.training.errors import Diverged, InvalidArgument
from manylora.training.job import Job, total_steps
from manylora.training.rate.curve import CANDIDATES, Curve
from manylora.training.rate.progress import SearchProgress
from manylora.training.rate.rows import first, split_end
from manylora.training.rate.state import each_from_here
from manylora.training.rate.trials import FINALISTS, WARMUP, Trial, halving, range_test, trial
from manylora.training.report.panel import clock
from manylora.training.report.record import SearchFacts

RANGE_STEPS = 60
TRIAL_SHARE, LEAST_TRIAL = 0.1, 50
"""Steps of a trial in the first round: a share of the run's, and at least so many. Short trials favour high rates: the
last round of a short run is as long as the run."""
LONGEST_TRIAL = 2
"""Times the steps of the first round that the last one has; no trial is longer than the run."""
EVAL_ROWS = 256
"""Held-out rows that judge a trial."""
LEAST_ROWS = 8
HELD_OUT_SHARE = 0.05
"""Of the training rows, kept from the trials where there is no evaluation data."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The rate, and why."""

    rate: float
    reason: str
    curve: Curve
    trials: tuple[Trial, ...]
    steps: int = 0
    """Of the range test and all trials."""
    seconds: float = 0.0

    def facts(self) -> SearchFacts:
        """Return what a run's record keeps of it."""
        return SearchFacts(
            rate=self.rate,
            steps=self.steps,
            seconds=self.seconds,
            curve=tuple(zip(self.curve.rates, self.curve.smoothed, strict=True)),
            trials=tuple((each.rate, each.steps, each.loss) for each in self.trials),
        )


def find_learning_rate(job: Job, say: Callable[[str], None]) -> Choice:
    """Find a rate for the job and leave everything as it was: weights, random states, data order.

    Says first what it will cost. Raises Diverged when every candidate falls apart.
    """
    searching = for_search(job)
    steps = total_steps(job.arguments.training, len(job.prepared.train.dataset))
    budget = min(max(LEAST_TRIAL, round(TRIAL_SHARE * steps)), max(1, steps // LONGEST_TRIAL))
    most = RANGE_STEPS + WARMUP + halving_steps(CANDIDATES, budget)
    say(
        f"Looking for a learning rate: up to {most:,} trial steps before the {steps:,} of the run, which makes it"
        f" {1 + most / steps:.1f} times as long; with --learning_rate X there are none"
    )
    live = job.arguments.run.live and is_first_process()
    with SearchProgress(most, say, live=live) as progress, each_from_here(job.prepared.model) as start:
        searching.watchers = (progress,)
        curve = range_test(searching, RANGE_STEPS)
        candidates = curve.candidates()
        names = ", ".join(f"{rate:.1e}" for rate in candidates)
        left = progress.expected(halving_steps(len(candidates), budget))
        say(
            f"the loss is lowest at {curve.edge:.1e}; candidates: {names}, from {budget} steps each, {clock(left)}"
            " in all"
        )

        def run(rate: float, length: int) -> Trial:
            start.again()
            found = trial(searching, rate, length)
            say(f"{rate:.1e}: held-out loss {found.loss:.4g} after {length} steps")
            return found

        trials = tuple(halving(candidates, budget, run))
        return replace(_choose(curve, trials), steps=progress.done, seconds=progress.seconds)


def halving_steps(candidates: int, steps: int) -> int:
    """Return the steps of all trials together, where none falls apart."""
    total = 0
    while True:
        total += candidates * steps
        if candidates <= FINALISTS:
            return total
        candidates, steps = max(FINALISTS, math.ceil(candidates / 2)), steps * 2


def _choose(curve: Curve, trials: tuple[Trial, ...]) -> Choice:
    longest = max(each.steps for each in trials)
    last = sorted((each for each in trials if each.steps == longest), key=lambda each: each.loss)
    best = last[0]
    if not math.isfinite(best.loss):
        raise Diverged(
            "--learning_rate auto: the loss ran away at every rate that was tried; run `manylora data check`, and"
            " try --bf16 in place of --fp16"
        )
    beside = ", ".join(f"{each.loss:.4g} at {each.rate:.1e}" for each in last[1:])
    reason = (
        f"--learning_rate {best.rate:.1e}: held-out loss {best.loss:.4g} after {best.steps} steps, the lowest of"
        f" {len({each.rate for each in trials})} candidates ({beside}); the range test turned at {curve.edge:.1e}"
    )
    return Choice(best.rate, reason, curve, trials)


def for_search(job: Job) -> Job:
    """Return the job over data that trials may use: some rows are held out of training where none are yet."""
    prepared = job.prepared
    if prepared.held_out is not None:
        return job.over(prepared.train.dataset, first(prepared.held_out.dataset, EVAL_ROWS))
    rows = len(prepared.train.dataset)
    aside = min(EVAL_ROWS, max(1, round(rows * HELD_OUT_SHARE)))
    if rows - aside < LEAST_ROWS:
        raise InvalidArgument(
            f"--learning_rate auto needs more than {rows} rows to try rates on: give a number"
        )
    return job.over(*split_end(prepared.train.dataset, aside))


def apply(job: Job, choice: Choice) -> None:
    """Have the job train at the rate that was chosen."""
    job.changes["learning_rate"] = choice.rate


def write_choice(choice: Choice, directory: Path) -> Path:
    """Draw curve and trials into ``directory``/learning_rate.svg."""
    from manylora.training.rate.plot import plot_choice

    path = directory / "learning_rate.svg"
    path.write_text(plot_choice(choice), encoding="utf-8")
    return path
