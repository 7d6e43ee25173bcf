"""Plans held against long runs of `manylora train` on rows of all lengths, as data is: 200 steps on this CPU.

memory_table.py prints this as its third table. Two steps on rows of one length show what tensors take; what libraries
keep for every shape that they meet, and holes between blocks, show only here.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.checks.qwen_memory import GIB

DEMO = Path(__file__).resolve().parents[2] / "demo" / "base"
STEPS = 200
ROWS, EVAL_ROWS = 800, 64
GUIDE = (
    "--use_lora --lora_r 64 --lora_alpha 16 --per_device_train_batch_size 2 --gradient_accumulation_steps 8"
    " --learning_rate 3e-4 --model_max_length 1024"
)
ANSWERS = "--eval_strategy steps --eval_steps 100 --eval_answers exact --eval_answers_max_new_tokens 32"


@dataclass(frozen=True, slots=True)
class LongRun:
    """One run."""

    name: str
    base: str
    """demo, or one of memory_table's."""
    flags: str
    evaluated: bool = False
    """Whether there is held-out data."""


LONG = (
    LongRun("demo, the guide's flags, bf16", "demo", f"--bf16 True {GUIDE}"),
    LongRun("demo, the guide's flags, float32", "demo", GUIDE),
    LongRun("demo, bf16, --eval_answers", "demo", f"--bf16 True {GUIDE} {ANSWERS}", True),
    LongRun("demo, float32, --eval_answers", "demo", f"{GUIDE} {ANSWERS}", True),
    LongRun("demo, Q-LoRA, bf16, --eval_answers", "demo", f"--bf16 True --q_lora {GUIDE} {ANSWERS}", True),
    LongRun(
        "h256/8L/32k lora r8, 2 rows of up to 512, bf16",
        "h256/8L/32k",
        "--bf16 True --use_lora --lora_r 8 --per_device_train_batch_size 2 --model_max_length 512",
    ),
    LongRun(
        "h512/6L/152k Q-LoRA r16, a row of up to 128, bf16, evaluated by 8",
        "h512/6L/152k",
        "--bf16 True --q_lora --lora_r 16 --per_device_train_batch_size 1 --model_max_length 128"
        " --gradient_checkpointing",
        True,
    ),
)
QUICK = LONG[:1]


def write_rows(path: Path, count: int, longest: int, seed: int) -> Path:
    """Write rows whose answers have from 8 to ``longest`` words, of about a token each."""
    rng = random.Random(seed)
    rows = [
        {
            "conversations": [
                {"from": "user", "value": f"{index}"},
                {"from": "assistant", "value": " ".join(_words(rng, rng.randint(8, longest)))},
            ]
        }
        for index in range(count)
    ]
    path.write_text(json.dumps(rows))
    return path


def _words(rng: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        yield "".join(rng.choices("abcdefghijklm", k=rng.randint(1, 5)))


def data_flags(run: LongRun, directory: Path) -> list[str]:
    """Write the run's data and return its flags."""
    if run.base == "demo":
        words = [
            "-m",
            "manylora.demo.task_data",
            str(directory),
            "--rows",
            str(ROWS),
            "--eval-rows",
            str(EVAL_ROWS),
        ]
        subprocess.run([sys.executable, *words], check=True)
        train, held_out = directory / "sql.json", directory / "sql-eval.json"
    else:
        longest = int(run.flags.split("--model_max_length ")[1].split()[0])
        train = write_rows(directory / "train.json", ROWS, longest, 0)
        held_out = write_rows(directory / "eval.json", EVAL_ROWS, longest, 1)
    return ["--data_path", str(train), *(["--eval_data_path", str(held_out)] if run.evaluated else [])]


def measure_long(run: LongRun, base: Path, directory: Path, steps: int = STEPS) -> tuple[float, float]:
    """Run `manylora train`; return its peak resident memory and what it planned for itself, in GiB.

    Raises RuntimeError with what it said.
    """
    output = directory / "out"
    words = [
        *(sys.executable, "-m", "manylora", "train", "--model_name_or_path", str(base)),
        *(*data_flags(run, directory), "--output_dir", str(output), "--overwrite_output_dir"),
        *("--max_steps", str(steps), "--data_check", "off", "--report_to", "none"),
        *run.flags.split(),
    ]
    peak = peak_gib(run.name, words)
    planned = json.loads((output / "run.json").read_text())["memory"]["planned"]
    return peak, sum(planned.values())


def peak_gib(name: str, words: Sequence[str]) -> float:
    """Run a command to its end; return its peak resident memory in GiB. Raises RuntimeError with what it said."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{name}: {said.read().decode(errors='replace')[-2000:]}")
    return usage.ru_maxrss * 1024 / GIB
