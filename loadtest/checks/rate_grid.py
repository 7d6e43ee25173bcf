"""--learning_rate auto against a grid: how far its eval loss is from the best that any rate of the grid reaches.

    python -m manylora.loadtest.checks.rate_grid [--tasks sql json pirate] [--steps 60] [--seeds 2]

Every run is `manylora train` on the demo base, as a user would start it, with the same seed and data; only the rate
differs; losses are means over the seeds. The bar: within 5 % of the grid's best eval loss. The demo's tasks are learnt
almost completely, and losses near zero differ by more than that from seed to seed: the table shows all of them.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from manylora.loadtest.checks.train_speed import BASE, run
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.text_table import text_table

GRID = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
BAR = 0.05


def eval_loss(place: Path, task: str, rate: str, steps: int, seed: int) -> tuple[float, float]:
    """Train at ``rate`` (or auto) and return the eval loss and the rate that was used."""
    output = place / f"{task}-{rate}-{seed}"
    flags = (
        f"train --model_name_or_path {BASE} --data_path {place / f'{task}.json'}"
        f" --eval_data_path {place / f'{task}-eval.json'} --output_dir {output} --use_lora --q_lora --lora_r 8"
        f" --lora_alpha 16 --learning_rate {rate} --model_max_length 512 --max_steps {steps} --warmup_steps 0.05"
        f" --per_device_train_batch_size 8 --save_strategy no --data_check off --seed {seed}"
    )
    run(["manylora", *flags.split()])
    record = json.loads((output / "run.json").read_text())
    rates = [entry["learning_rate"] for entry in record["history"]["log"] if "learning_rate" in entry]
    return record["results"]["eval_loss"], max(rates)


def one_task(place: Path, task: str, steps: int, seeds: int) -> tuple[bool, list[str]]:
    """Train a task at every rate and at the one that is found. Returns whether the bar holds, and the table's row."""

    def mean(rate: str) -> tuple[float, list[float]]:
        found = [eval_loss(place, task, rate, steps, seed) for seed in range(1, seeds + 1)]
        return statistics.fmean(loss for loss, _ in found), [used for _, used in found]

    losses = [mean(rate)[0] for rate in GRID]
    found, used = mean("auto")
    excess = found / min(losses) - 1
    rates = ", ".join(f"{each:.1e}" for each in used)
    numbers = [f"{each:.3g}" for each in (*losses, found)]
    return excess <= BAR, [task, *numbers, rates, f"{excess:+.0%}", "holds" if excess <= BAR else "FAILS"]


def main() -> None:
    """Run the command; exit status 1 when a task misses the bar."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.checks.rate_grid", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["sql", "json", "pirate"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run(["manylora.demo.task_data", str(place), "--rows", "2000", "--eval-rows", "100"])
        found = [one_task(place, task, given.steps, given.seeds) for task in given.tasks]
    head = ["task", *GRID, "auto", "its rates", "to the best", f"bar {BAR:.0%}"]
    sys.stdout.write(f"{headline()}\n{text_table(head, [row for _, row in found])}\n")
    sys.exit(0 if all(holds for holds, _ in found) else 1)


if __name__ == "__main__":
    main()
