"""The guard's bar: healthy runs of mixed data are let alone, and runs that fall apart are caught.

    python -m manylora.loadtest.checks.divergence [--healthy 20] [--diverging 10] [--steps 120] [--small]

Every run is `manylora train` on the demo base, as a user would start it. Half of the rows are answered by the base
itself, half are new to it (its questions, to be answered in SQL), shuffled or one half after the other, one or two rows
a step. A healthy run has a usual rate: it must not be stopped nor taken back, and its held-out loss must fall. A
diverging one has a rate that is far too high, at once or once the warm-up gets there: it must be stopped or taken back,
and where it comes to its end with a loss above the one it began with, its last line and its report must say so.
That it does diverge is shown by the same run with `--guard off`, whose held-out loss ends more than a nat above where
it began.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.loadtest.checks.train_speed import BASE, ROOT
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.text_table import text_table

ROWS, HELD_OUT = 160, 24
SHIFT = 1.0
"""Nats per token that a held-out loss must have risen by for a run to have diverged."""
WORSE = "worse than the base"
"""What a run says of its adapter where it did harm."""
HARM = 0.3
"""Nats per token that a held-out loss may end above where it began without a word."""
HEAD = (
    "run",
    "seed",
    "rate",
    "warm-up",
    "rows a step",
    "order",
    "held-out loss",
    "without guard",
    "guard",
    "bar",
)
WILD: Sequence[tuple[str, str, str]] = (
    ("1", "0", "1"),
    ("0.3", "0", "1"),
    ("3", "0", "0"),
    ("10", "0.1", "1"),
    ("1", "0.5", "1"),
    ("1", "0.9", "0"),
    ("30", "0.9", "1"),
    ("0.3", "0.3", "0"),
    ("100", "0", "1"),
    ("1e6", "0.05", "0"),
)
"""Rates, warm-ups and the norm that gradients are clipped at (0: not) of the runs that diverge."""
RATES = ("1e-4", "3e-4", "1e-3", "2e-3")
LEARNS_SOON = 2
"""The healthy run of the small form: its held-out loss falls by far more than sums differ by between machines."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""A run that falls apart goes another way with each other order of a sum, and with more threads than cores it takes
ten times as long."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run's settings."""

    seed: int
    rate: str
    batch: int
    sorted: bool
    """Whether all known rows come first."""
    warmup: str = "0.03"
    clip: str = "1"

    def cells(self) -> list[str]:
        """Return them for the table."""
        return [
            str(self.seed),
            self.rate,
            self.warmup,
            str(self.batch),
            "sorted" if self.sorted else "shuffled",
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    stopped: bool
    steps_back: int
    losses: tuple[float, ...]
    """Held-out, from before the first step on."""
    says_worse: bool = False
    """Whether its last line and its report say that the adapter is worse than the base."""

    @property
    def was_caught(self) -> bool:
        """Whether the guard did anything."""
        return self.stopped or self.steps_back > 0

    @property
    def shift(self) -> float:
        """How far the held-out loss came; infinite if it is no number any more."""
        return self.losses[-1] - self.losses[0] if len(self.losses) > 1 else math.inf

    @property
    def is_told(self) -> bool:
        """Whether a run that came to its end says that it did harm where it did, and not where it didn't."""
        if self.stopped:
            return True
        return self.shift >= 0 if self.says_worse else self.shift <= HARM

    @property
    def guard(self) -> str:
        """What the guard did, in words."""
        back = f"{self.steps_back} steps back" if self.steps_back else ""
        did = ", ".join(filter(None, (back, "stopped" if self.stopped else ""))) or "let it alone"
        return f"{did}; said to be worse than the base" if self.says_worse else did


def write_mixed(place: Path, seed: int) -> tuple[Path, Path]:
    """Write rows for training, the known half first, and held-out ones. Returns both files."""
    directory = place / f"data{seed}"
    words = [sys.executable, "-m", "manylora.demo.task_data", str(directory), "--seed", str(seed)]
    sizes = ["--rows", str(ROWS // 2), "--eval-rows", str(HELD_OUT // 2)]
    subprocess.run([*words, *sizes], cwd=ROOT, check=True, capture_output=True)
    files = []
    for suffix in ("", "-eval"):
        known = json.loads((directory / f"plain{suffix}.json").read_text())
        new = json.loads((directory / f"sql{suffix}.json").read_text())
        for row in new:
            row["conversations"][0]["value"] += " Answer with the query."
        random.Random(seed).shuffle(new)
        files.append(directory / f"mixed{suffix}.json")
        files[-1].write_text(json.dumps([*known, *new]))
    return files[0], files[1]


def run(place: Path, settings: Run, steps: int, guard: str) -> Outcome:
    """Run a command to its end. Raises RuntimeError with its last lines where it failed for another reason."""
    data, held_out = write_mixed(place, settings.seed)
    output = place / f"{settings.seed}-{settings.rate}-{settings.batch}-{guard}"
    order = "sequential" if settings.sorted else "random"
    flags = (
        f"train --model_name_or_path {BASE} --data_path {data} --eval_data_path {held_out} --output_dir {output}"
        f" --use_lora --lora_r 8 --lora_alpha 16 --learning_rate {settings.rate} --warmup_steps {settings.warmup}"
        f" --max_grad_norm {settings.clip} --max_steps {steps} --per_device_train_batch_size {settings.batch}"
        f" --train_sampling_strategy {order} --model_max_length 512 --save_strategy no --data_check off --seed"
        f" {settings.seed} --eval_on_start True --eval_strategy steps --eval_steps {max(1, steps // 4)} --guard {guard}"
    )
    done = subprocess.run(
        [sys.executable, "-m", "manylora", *flags.split()],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        check=False,
    )
    stopped = "stopped at step" in done.stderr
    if done.returncode and not stopped:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-5:]))
    last = (done.stdout + done.stderr).strip().rpartition("\n")[2]
    return outcome_of(json.loads((output / "run.json").read_text()), last, stopped=stopped)


def outcome_of(record: dict[str, Any], last_line: str, *, stopped: bool) -> Outcome:
    """Read what became of a run from its run.json and the last line that it printed."""
    history = record["history"]
    back = sum(event["kind"] == "backoff" for event in history["events"])
    found = [entry["eval_loss"] for entry in history["log"] if "eval_loss" in entry]
    worse = WORSE in last_line and WORSE in record["outcome"]
    return Outcome(stopped, back, tuple(math.inf if loss is None else loss for loss in found), worse)


def healthy(place: Path, seed: int, steps: int) -> tuple[bool, list[str]]:
    """Run one that must be let alone. Returns whether it was, and the table's row."""
    settings = Run(seed, RATES[seed % len(RATES)], 1 + seed // 2 % 2, sorted=seed % 2 == 1)
    found = run(place, settings, steps, "on")
    holds = not found.was_caught and found.shift < 0 and found.is_told
    return holds, ["healthy", *settings.cells(), _losses(found), "", found.guard, _word(holds)]


def diverging(place: Path, number: int, steps: int, *, proven: bool) -> tuple[bool, list[str]]:
    """Run one that must be caught, and with ``proven`` again without a guard."""
    rate, warmup, clip = WILD[number % len(WILD)]
    settings = Run(100 + number, rate, 1 + number % 2, sorted=number % 3 == 2, warmup=warmup, clip=clip)
    found = run(place, settings, steps, "on")
    alone = run(place, settings, steps, "off") if proven else None
    diverged = alone is None or alone.shift > SHIFT or not math.isfinite(alone.shift)
    holds = found.was_caught and diverged and found.is_told
    without = "" if alone is None else _losses(alone)
    verdict = _word(holds) if diverged else "did not diverge"
    return holds, ["diverging", *settings.cells(), _losses(found), without, found.guard, verdict]


def _losses(found: Outcome) -> str:
    return f"{found.losses[0]:.2f} → {found.losses[-1]:.2f}" if found.losses else "–"


def _word(holds: bool) -> str:
    return "holds" if holds else "FAILS"


def _said(found: tuple[bool, list[str]]) -> tuple[bool, list[str]]:
    """Write a run's row as soon as it is there, beside the table: all of them take minutes."""
    sys.stderr.write(" | ".join(filter(None, found[1])) + "\n")
    return found


def main() -> None:
    """Run the command; exit status 1 when a healthy run was touched or a diverging one was not."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.divergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--healthy", type=int, default=20, help="runs that must be let alone")
    parser.add_argument("--diverging", type=int, default=10, help="runs that must be caught")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--small", action="store_true", help="one of each, as the test suite runs it")
    given = parser.parse_args()
    seeds = [LEARNS_SOON] if given.small else range(1, 1 + given.healthy)
    wild = 1 if given.small else given.diverging
    steps = 40 if given.small else given.steps
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found = [_said(healthy(place, seed, steps)) for seed in seeds]
        found += [_said(diverging(place, number, steps, proven=not given.small)) for number in range(wild)]
    sys.stdout.write(f"{headline()}\n{text_table(HEAD, [row for _, row in found])}\n")
    good = sum(holds for holds, _ in found)
    sys.stdout.write(f"{good} of {len(found)} as promised\n")
    sys.exit(0 if good == len(found) else 1)


if __name__ == "__main__":
    main()
