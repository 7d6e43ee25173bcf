"""--learning_rate auto against a grid: how far its eval loss is from the best that any rate of the grid reaches.

    python -m loadtest.rate_grid [--tasks sql json pirate] [--steps 120]

Every run is `manylora train` on the demo base, as a user would start it, with the same seed and data; only the rate
differs. The bar: within 5 % of the grid's best eval loss. Losses near zero differ by more than that from seed to seed,
so the table shows the best and its neighbours too.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from loadtest.environment import headline
from loadtest.text_table import text_table
from loadtest.train_speed import BASE, run

GRID = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
BAR = 0.05


def eval_loss(place: Path, task: str, rate: str, steps: int) -> tuple[float, float]:
    """Train at ``rate`` (or auto) and return the eval loss and the rate that was used."""
    output = place / f"{task}-{rate}"
    flags = (
        f"train --model_name_or_path {BASE} --data_path {place / f'{task}.json'}"
        f" --eval_data_path {place / f'{task}-eval.json'} --output_dir {output} --use_lora --q_lora --lora_r 8"
        f" --lora_alpha 16 --learning_rate {rate} --model_max_length 512 --max_steps {steps} --warmup_steps 0.05"
        " --per_device_train_batch_size 8 --save_strategy no --data_check off"
    )
    run(["manylora", *flags.split()])
    record = json.loads((output / "run.json").read_text())
    rates = [entry["learning_rate"] for entry in record["history"]["log"] if "learning_rate" in entry]
    return record["results"]["eval_loss"], max(rates)


def main() -> None:
    """Run the command; exit status 1 when a task misses the bar."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.rate_grid", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["sql", "json", "pirate"])
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    rows, fails = [], 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run(["demo.task_data", str(place), "--rows", "2000", "--eval-rows", "100"])
        for task in given.tasks:
            losses = [eval_loss(place, task, rate, given.steps)[0] for rate in GRID]
            found, rate = eval_loss(place, task, "auto", given.steps)
            excess = found / min(losses) - 1
            fails += excess > BAR
            verdict = "holds" if excess <= BAR else "FAILS"
            rows.append(
                [
                    task,
                    *(f"{each:.4g}" for each in losses),
                    f"{found:.4g}",
                    f"{rate:.1e}",
                    f"{excess:+.1%}",
                    verdict,
                ]
            )
    head = ["task", *GRID, "auto", "its rate", "to the best", f"bar {BAR:.0%}"]
    sys.stdout.write(f"{headline()}\n{text_table(head, rows)}\n")
    sys.exit(1 if fails else 0)


if __name__ == "__main__":
    main()
