"""Four adapters at once (`manylora train --tasks`) against the same four one after the other, as a user would run them.

``python -m manylora.loadtest.checks.tasks_speed`` writes the demo's four tasks as data files, runs the commands in
turn, each a process of its own, and prints time and memory of both: the training loops alone, and the whole commands
with everything that a command does before and after. The work is the same: equal rows, steps, batches, ranks and,
without dropout, losses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.text_table import text_table

ROOT = Path(__file__).resolve().parents[2]
WANTED = 1.5
"""Bar 7: so many times as fast."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TASKS: Mapping[str, Mapping[str, object]] = {
    "sql": {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]},
    "json": {"lora_r": 8, "lora_target_modules": ATTENTION},
    "pirate": {"lora_r": 16, "lora_target_modules": MLP},
    "plain": {"lora_r": 8, "lora_target_modules": [*ATTENTION, *MLP]},
}
"""The demo's tasks with the ranks and targets of its adapters, and its base's own form as the fourth."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one command took."""

    seconds: float
    """From its start to its end."""
    processor_seconds: float
    loop_seconds: float
    """Of training itself, as the run's own record has it."""
    peak_mib: float
    loss: tuple[float, ...]
    """Mean training loss, of each task."""


def main() -> None:
    """Run the comparison. Exit status 1 under the bar."""
    options = _options()
    console = Console(highlight=False, soft_wrap=True)
    console.print(headline(), markup=False)
    with tempfile.TemporaryDirectory(prefix="manylora-tasks-") as scratch:
        directory = Path(scratch)
        _run(
            [
                sys.executable,
                "-m",
                "manylora.demo.task_data",
                str(directory / "data"),
                "--rows",
                str(options.rows),
            ]
        )
        singles, together = [], []
        for number in range(options.rounds):
            singles += [_single(directory, name, number, options) for name in TASKS]
            together.append(_together(directory, number, options))
    sys.exit(0 if _report(console, singles, together, options) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.tasks_speed", description=__doc__
    )
    parser.add_argument("--base", default="demo/base")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of each task")
    parser.add_argument("--batch", type=int, default=2, help="rows of a task's micro-batch; the guide's")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of a step; the guide's")
    parser.add_argument("--rows", type=int, default=1600, help="rows of each task's data")
    parser.add_argument("--dropout", type=float, default=0.05, help="the flag's default")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is run, in turn")
    return parser.parse_args()


def _flags(options: argparse.Namespace) -> dict[str, object]:
    return {
        "model_name_or_path": str(options.base),
        "q_lora": True,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation,
        "lora_dropout": options.dropout,
        "learning_rate": 1e-3,
        "model_max_length": 512,
        "save_strategy": "no",
    }


def _single(directory: Path, name: str, number: int, options: argparse.Namespace) -> Ran:
    out = directory / f"{name}-{number}"
    words = ["--data_path", str(directory / "data" / f"{name}.json"), "--output_dir", str(out)]
    for key, value in {**_flags(options), **TASKS[name]}.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return _measured(words, [out])


def _together(directory: Path, number: int, options: argparse.Namespace) -> Ran:
    out = directory / f"together-{number}"
    tasks = {
        name: {**own, "data_path": str(directory / "data" / f"{name}.json")} for name, own in TASKS.items()
    }
    plan = directory / "tasks.yaml"
    plan.write_text(yaml.safe_dump({**_flags(options), "tasks": tasks}, sort_keys=False))
    return _measured(["--tasks", str(plan), "--output_dir", str(out)], [out / name for name in TASKS])


def _measured(words: Sequence[str], folders: Sequence[Path]) -> Ran:
    command = [sys.executable, "-m", "manylora", "train", *words]
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        # wait4 tells what this one process used; subprocess itself has no such call.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')}")
    records = [json.loads((folder / "run.json").read_text())["results"] for folder in folders]
    return Ran(
        seconds=seconds,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        loop_seconds=max(record["train_seconds"] for record in records),
        peak_mib=usage.ru_maxrss / 1024,
        loss=tuple(record["train_loss"] for record in records),
    )


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _report(console: Console, singles: list[Ran], together: list[Ran], options: argparse.Namespace) -> bool:
    rounds = len(together)
    rows = []
    ratios = {}
    for what, name in (
        ("training loops, s", "loop_seconds"),
        ("whole commands, s", "seconds"),
        ("whole commands, processor s", "processor_seconds"),
    ):
        apart = sum(getattr(each, name) for each in singles) / rounds
        at_once = sum(getattr(each, name) for each in together) / rounds
        ratios[name] = apart / at_once
        rows.append((what, f"{apart:.1f}", f"{at_once:.1f}", f"{apart / at_once:.2f} ×"))
    largest, peak = max(each.peak_mib for each in singles), max(each.peak_mib for each in together)
    four = sum(each.peak_mib for each in singles) / rounds
    rows.append(("peak memory, MiB: the largest command", f"{largest:.0f}", f"{peak:.0f}", ""))
    rows.append(
        ("peak memory, MiB: four at the same time", f"{four:.0f}", f"{peak:.0f}", f"{four / peak:.2f} ×")
    )
    title = f"{len(TASKS)} tasks of {options.steps} steps, {options.batch} rows × {options.accumulation}"
    console.print(f"\n{title}, base {options.base} in NF4, {rounds} round(s)\n", markup=False)
    console.print(text_table(("", "one by one", "--tasks", ""), rows), markup=False)
    for how, losses in (
        ("one by one", [each.loss[0] for each in singles[: len(TASKS)]]),
        ("--tasks", together[0].loss),
    ):
        console.print(f"train losses {how}: {', '.join(f'{loss:.4f}' for loss in losses)}")
    good = bool(min(ratios["loop_seconds"], ratios["seconds"]) >= WANTED)
    console.print(
        f"{'pass' if good else 'FAIL'}: at least {WANTED} × as fast, the training loops alone and the whole commands"
    )
    return good


if __name__ == "__main__":
    main()
