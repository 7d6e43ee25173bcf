"""Fixed ranks, a growing one and AdaLoRA at equal steps: `python -m manylora.loadtest.lab.rank_table`.

Runs `manylora train` as a user would, on the demo's base and one of its tasks, with the same data, scale α/r and steps
for every method, each at several learning rates, since what is best for one isn't for another. Prints held-out loss,
seconds, peak memory and trained parameters, each as mean ± standard deviation over seeds. CPU seconds and memory (the
largest resident set) are those of the whole command, loading and evaluating included; CPU seconds stay what they are on
a machine that does other things too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from manylora.loadtest.material.text_table import text_table

KIB_PER_GIB = 2**20


@dataclass(frozen=True, slots=True)
class Method:
    """A way to choose the rank."""

    name: str
    first_rank: int
    schedule: str | None = None
    """None: the rank stays."""
    rate: float = 1.0
    """Times the rate that was asked for."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Those of `manylora train`. Alpha is twice the first rank, so that every scale is 2."""
        rank = (
            ("--lora_r", str(self.first_rank))
            if self.schedule is None
            else ("--rank_schedule", self.schedule)
        )
        return (*rank, "--lora_alpha", str(2 * self.first_rank))


METHODS = (
    Method("fixed 8", 8),
    Method("fixed 64", 64),
    Method("growing 8, 16, 64", 8, "8:0,16:0.3,64:0.6"),
    # Its factors start at 0, 0.02 and 0.02: at LoRA's rates it learns next to nothing in so few steps.
    Method("AdaLoRA 12 to 8", 12, "adalora:12:8", rate=10),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What all methods train."""

    base: Path
    task: str
    steps: int
    batch: int
    rows: int
    eval_rows: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run."""

    method: str
    rate: float
    """The learning rate."""
    seed: int
    eval_loss: float
    train_seconds: float
    cpu_seconds: float
    peak_memory_gib: float
    trained_parameters: int


def write_data(job: Job, directory: Path) -> None:
    """Write the demo's tasks as data files."""
    sizes = ("--rows", str(job.rows), "--eval-rows", str(job.eval_rows))
    subprocess.run([sys.executable, "-m", "manylora.demo.task_data", str(directory), *sizes], check=True)


def train(job: Job, method: Method, rate: float, seed: int, data: Path, output: Path) -> Outcome:
    """Run the command and read its run.json. Raises SystemExit with what it printed when it fails."""
    command = [
        *(sys.executable, "-m", "manylora", "train", "--use_lora", "--no_live", "--report_to", "none"),
        *("--model_name_or_path", str(job.base), "--data_path", str(data / f"{job.task}.json")),
        *("--eval_data_path", str(data / f"{job.task}-eval.json"), "--data_check", "off"),
        *("--output_dir", str(output), "--max_steps", str(job.steps), "--save_strategy", "no"),
        *("--per_device_train_batch_size", str(job.batch), "--learning_rate", str(rate)),
        *("--lr_scheduler_type", "cosine", "--warmup_steps", "10", "--seed", str(seed)),
        *method.flags,
    ]
    with (log := output.with_suffix(".log")).open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        # Not process.wait(): it says nothing of what this one child used.
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{method.name}, seed {seed}: manylora train failed:\n{log.read_text()}")
    results = json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]
    return Outcome(
        method.name,
        rate,
        seed,
        eval_loss=results["eval_loss"],
        train_seconds=results["train_seconds"],
        cpu_seconds=used.ru_utime + used.ru_stime,
        peak_memory_gib=used.ru_maxrss / KIB_PER_GIB,
        trained_parameters=results["trained_parameters"],
    )


def report(outcomes: Sequence[Outcome]) -> str:
    """Return the table of the outcomes, a line for each method at each rate."""
    head = ("method", "rate", "eval loss", "train s", "CPU s", "peak GiB", "trained parameters", "seeds")
    lines = []
    for name, rate in sorted({(outcome.method, outcome.rate) for outcome in outcomes}):
        runs = [outcome for outcome in outcomes if (outcome.method, outcome.rate) == (name, rate)]
        lines.append(
            (
                name,
                f"{rate:g}",
                _spread([run.eval_loss for run in runs], 4),
                _spread([run.train_seconds for run in runs], 1),
                _spread([run.cpu_seconds for run in runs], 1),
                _spread([run.peak_memory_gib for run in runs], 2),
                f"{runs[0].trained_parameters:,}",
                str(len(runs)),
            )
        )
    return text_table(head, lines)


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.lab.rank_table", description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("demo/base"))
    parser.add_argument("--task", default="json", help="of the demo: sql, json or pirate")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--eval-rows", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write settings and every run's figures here")
    parser.add_argument(
        "--of", type=Path, metavar="JSON", help="print the table of such a file, and train nothing"
    )
    given = parser.parse_args()
    if given.of is not None:
        kept = json.loads(given.of.read_text(encoding="utf-8"))["outcomes"]
        print(report([Outcome(**each) for each in kept]))  # noqa: T201  # the result
        return
    job = Job(given.base, given.task, given.steps, given.batch, given.rows, given.eval_rows)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        write_data(job, data)
        # Seed by seed, so that whatever else the machine does meets all methods alike.
        runs = list(product(range(given.seeds), given.rates, METHODS))
        for index, (seed, rate, method) in enumerate(runs):
            outcomes.append(train(job, method, rate * method.rate, seed, data, Path(scratch) / str(index)))
            print(json.dumps(asdict(outcomes[-1])), file=sys.stderr, flush=True)  # noqa: T201  # the result
    print(report(outcomes))  # noqa: T201  # the result
    if given.json is not None:
        written = {
            "job": {**asdict(job), "base": str(job.base)},
            "outcomes": [asdict(each) for each in outcomes],
        }
        given.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
