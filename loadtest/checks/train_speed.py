"""`manylora train` beside a plain TRL SFTTrainer: the same job, alternating, in one run on one machine.

    python -m manylora.loadtest.checks.train_speed [--rounds 3] [--steps 60] [--batch 8]

Both train LoRA of the same rank on all linear layers of the demo base, in float32, from the same rows with the same
global batch, with the same tokenizer. TRL trains the newline after an answer's stop token too, which is why its losses
are others. The commands run as a user would start them. The bar: at least the peer's speed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.text_table import text_table

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "demo" / "base"
BAR = 1.0


def run(words: list[str]) -> float:
    """Run a command to its end and return its seconds. Raises RuntimeError with its last lines if it fails."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-5:]))
    return time.perf_counter() - began


def ours(data: Path, output: Path, steps: int, batch: int) -> tuple[float, float, list[float]]:
    """Return seconds of training, seconds in all, and every step's loss."""
    flags = (
        f"train --model_name_or_path {BASE} --data_path {data} --output_dir {output} --use_lora --lora_r 16"
        f" --lora_alpha 16 --lora_dropout 0 --learning_rate 3e-4 --model_max_length 1024 --max_steps {steps}"
        f" --per_device_train_batch_size {batch} --save_strategy no --logging_steps 1 --data_check off"
    )
    seconds = run(["manylora", *flags.split()])
    record = json.loads((output / "run.json").read_text())
    losses = [entry["loss"] for entry in record["history"]["log"] if "loss" in entry]
    return record["results"]["train_seconds"], seconds, losses


def peer(data: Path, output: Path, steps: int, batch: int) -> tuple[float, float, list[float]]:
    """Return the same of TRL."""
    flags = f"{BASE} {data} {output} --steps {steps} --batch {batch} --rank 16"
    seconds = run(["manylora.loadtest.checks.trl_peer", *flags.split()])
    found = json.loads((output / "peer.json").read_text())
    return found["train_seconds"], seconds, found["losses"]


def one_round(place: Path, number: int, steps: int, batch: int) -> tuple[float, float, list[str]]:
    """Run both, one after the other. Returns TRL's seconds over ours, of training and in all, and the table's row."""
    data = place / "sql.json"
    trl, trl_all, trl_losses = peer(data, place / f"trl{number}", steps, batch)
    own, own_all, losses = ours(data, place / f"own{number}", steps, batch)
    times = [f"{own:.2f}", f"{trl:.2f}", f"{trl / own:.2f}", f"{own_all:.1f}", f"{trl_all:.1f}"]
    ends = [f"{statistics.fmean(each[-10:]):.3f}" for each in (losses, trl_losses)]
    return trl / own, trl_all / own_all, [str(number + 1), *times, *ends]


def main() -> None:
    """Run the command; exit status 1 below the bar."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.train_speed", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        run(["manylora.demo.task_data", str(place), "--rows", "1000", "--eval-rows", "1"])
        rounds = [one_round(place, number, given.steps, given.batch) for number in range(given.rounds)]
    head = [
        "round",
        "train s",
        "TRL train s",
        "ratio",
        "command s",
        "TRL command s",
        "last loss",
        "TRL last loss",
    ]
    sys.stdout.write(f"{headline()}\n{text_table(head, [row for _, _, row in rounds])}\n")
    ratio = statistics.median(each for each, _, _ in rounds)
    whole = statistics.median(each for _, each, _ in rounds)
    verdict = "holds" if ratio >= BAR else "FAILS"
    sys.stdout.write(
        f"training {ratio:.2f}x as fast as TRL (bar {BAR:g}: {verdict}); the whole command {whole:.2f}x\n"
    )
    sys.exit(0 if ratio >= BAR else 1)


if __name__ == "__main__":
    main()
