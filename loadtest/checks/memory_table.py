"""Plans held against measurements: Qwen's published table, and short and long runs of `manylora train` on this CPU.

Run it with ``python -m manylora.loadtest.checks.memory_table``; ``--only qwen``, ``--only cpu`` or ``--only long``
for one of the three, ``--rows TEXT`` for those whose name has the text, ``--quick`` for fewer cells. Every run is a
process of its own, and what counts is the kernel's figure for its highest resident memory (wait4's ru_maxrss),
libraries included: what the machine must have.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from manylora.loadtest.checks.memory_long import DEMO, LONG, LongRun, measure_long, peak_gib
from manylora.loadtest.checks.memory_long import QUICK as QUICK_LONG
from manylora.loadtest.checks.memory_long import STEPS as STEPS_OF_LONG
from manylora.loadtest.checks.qwen_memory import print_qwen_table, summary
from manylora.loadtest.material.checkpoints import BaseShape, write_base
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.gptq_copy import write_gptq_copy
from manylora.loadtest.material.text_table import text_table

STEPS = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    base: str
    method: str
    """lora, qlora, gptq (LoRA on a GPTQ copy), dora, or qdora (DoRA on NF4)."""
    seq: int
    batch: int
    rank: int
    checkpointing: bool

    @property
    def name(self) -> str:
        """Its sizes in a line."""
        return (
            f"{self.base} {self.method} r{self.rank} {self.batch}×{self.seq}"
            f"{' checkpointing' if self.checkpointing else ''}"
        )


BASES = {
    "h256/8L/32k": BaseShape("qwen2", 32000, 256, 704, 8, 4, 2, 4096),
    "h512/6L/152k": BaseShape("qwen2", 151936, 512, 1408, 6, 8, 2, 4096),
    "h1024/4L/32k untied": BaseShape("llama", 32000, 1024, 2816, 4, 16, 16, 4096, tied=False),
    "h768/5L/64k grouped": BaseShape("qwen3", 64000, 768, 2048, 5, 12, 4, 4096),
}
HELD_OUT = "h768/5L/64k grouped"
"""The base on which no constant of the plan was measured."""


GRID = (
    Cell("h256/8L/32k", "lora", 512, 4, 8, False),
    Cell("h256/8L/32k", "lora", 1024, 4, 64, True),
    Cell("h256/8L/32k", "qlora", 512, 4, 64, False),
    Cell("h512/6L/152k", "lora", 128, 8, 8, False),
    Cell("h512/6L/152k", "lora", 512, 2, 64, True),
    Cell("h512/6L/152k", "qlora", 512, 1, 8, True),
    Cell("h512/6L/152k", "qlora", 1024, 2, 64, False),
    Cell("h1024/4L/32k untied", "lora", 512, 1, 64, False),
    Cell("h1024/4L/32k untied", "lora", 512, 4, 8, False),
    Cell("h1024/4L/32k untied", "lora", 1024, 2, 64, True),
    Cell("h1024/4L/32k untied", "qlora", 256, 1, 8, False),
    Cell("h1024/4L/32k untied", "qlora", 512, 4, 64, True),
    Cell(HELD_OUT, "lora", 512, 2, 16, False),
    Cell(HELD_OUT, "lora", 1024, 4, 16, False),
    Cell(HELD_OUT, "qlora", 1024, 2, 16, True),
    Cell("h1024/4L/32k untied", "gptq", 512, 2, 64, False),
    Cell("h1024/4L/32k untied", "gptq", 512, 2, 64, True),
    Cell("h1024/4L/32k untied", "dora", 512, 2, 8, False),
    Cell("h1024/4L/32k untied", "qdora", 512, 2, 8, False),
    Cell("h1024/4L/32k untied", "qdora", 512, 2, 8, True),
)
QUICK = GRID[::5]


def write_data(path: Path, tokens: int) -> Path:
    """Write rows whose answers are longer than ``tokens``, so that each is cut to just that length."""
    answer = "abcdefghij klm " * tokens
    rows = [
        {
            "conversations": [
                {"from": "user", "value": f"{i}"},
                {"from": "assistant", "value": f"{i} {answer}"},
            ]
        }
        for i in range(16)
    ]
    path.write_text(json.dumps(rows))
    return path


def measure(cell: Cell, base: Path, directory: Path) -> float:
    """Run `manylora train` and return its peak resident memory in GiB. Raises RuntimeError with what it said."""
    data = write_data(directory / "data.json", cell.seq)
    words = [
        *(
            sys.executable,
            "-m",
            "manylora",
            "train",
            "--model_name_or_path",
            str(base),
            "--data_path",
            str(data),
        ),
        *("--output_dir", str(directory / "out"), "--overwrite_output_dir", "--bf16", "True", "--use_lora"),
        *("--model_max_length", str(cell.seq), "--per_device_train_batch_size", str(cell.batch)),
        *(
            "--max_steps",
            str(STEPS),
            "--lora_r",
            str(cell.rank),
            "--data_check",
            "off",
            "--report_to",
            "none",
        ),
        *(["--q_lora"] if cell.method in ("qlora", "qdora") else []),
        *(["--use_dora"] if "dora" in cell.method else []),
        *(["--gradient_checkpointing"] if cell.checkpointing else []),
    ]
    return peak_gib(cell.name, words)


def predict(cell: Cell, base: Path) -> dict[str, float]:
    """Return the plan's parts and total in GiB, by the command that a user runs."""
    words = [
        *(sys.executable, "-m", "manylora", "plan", str(base), "--json", "--cpu", "64GiB"),
        *(
            "--method",
            "qlora" if cell.method in ("qlora", "qdora") else "lora",
            "--seq",
            str(cell.seq),
            "--batch",
            str(cell.batch),
            "--rank",
            str(cell.rank),
        ),
        *(["--gradient-checkpointing"] if cell.checkpointing else []),
        *(["--use-dora"] if "dora" in cell.method else []),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    return {**answer["parts"], "total": answer["total_gib"]}


def base_of(cell: Cell, directory: Path) -> Path:
    """Return the cell's base, written when it is asked for first."""
    place = directory / str(list(BASES).index(cell.base))
    if not place.is_dir():
        write_base(place, BASES[cell.base], dtype=torch.bfloat16)
    if cell.method != "gptq":
        return place
    packed = place.with_name(f"{place.name}-gptq")
    return packed if packed.is_dir() else write_gptq_copy(place, packed)


def print_cpu_table(directory: Path, cells: Sequence[Cell]) -> bool:
    """Print measured and planned of every run; return whether all are within 15 %."""
    lines, errors, beyond = [], [], []
    for cell in cells:
        base = base_of(cell, directory)
        measured, planned = measure(cell, base, directory), predict(cell, base)
        errors.append(planned["total"] / measured - 1)
        fixed = planned["context"]
        beyond.append((planned["total"] - fixed) / max(measured - fixed, 0.01) - 1)
        lines.append(
            [
                cell.name,
                f"{measured:.2f}",
                f"{planned['total']:.2f}",
                f"{errors[-1]:+.0%}",
                f"{beyond[-1]:+.0%}",
            ]
        )
        print(f"{len(lines)}: {' '.join(lines[-1])}", file=sys.stderr)  # noqa: T201  # the result
    heads = ["run", "measured GiB", "planned GiB", "off", "off beyond the libraries"]
    print(text_table(heads, lines))  # noqa: T201  # the result
    print(f"whole process: {summary(errors)}; beyond its libraries: {summary(beyond)}")  # noqa: T201  # the result
    print(f"{HELD_OUT} was not used to fit the plan's constants")  # noqa: T201  # the result
    return max(map(abs, errors)) <= 0.15


def print_long_table(directory: Path, runs: Sequence[LongRun]) -> bool:
    """Print measured and planned of every long run; return whether all are within 15 %."""
    lines, errors = [], []
    for index, run in enumerate(runs):
        base = DEMO
        if run.base != "demo":
            base = write_base(directory / f"long-{index}", BASES[run.base], dtype=torch.bfloat16)
        measured, planned = measure_long(run, base, directory)
        errors.append(planned / measured - 1)
        lines.append([run.name, f"{measured:.2f}", f"{planned:.2f}", f"{errors[-1]:+.0%}"])
        print(f"{len(lines)}: {' '.join(lines[-1])}", file=sys.stderr)  # noqa: T201  # the result
    print(text_table([f"{STEPS_OF_LONG} steps", "measured GiB", "planned GiB", "off"], lines))  # noqa: T201  # the result
    print(summary(errors))  # noqa: T201  # the result
    return max(map(abs, errors)) <= 0.15


def main() -> None:
    """Print the tables; end with status 1 when a cell is more than 15 % off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("qwen", "cpu", "long"))
    parser.add_argument("--rows", default="", help="those whose name has this in it")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    cells = [each for each in (QUICK if options.quick else GRID) if options.rows in each.name]
    runs = [each for each in (QUICK_LONG if options.quick else LONG) if options.rows in each.name]
    print(headline())  # noqa: T201  # the result
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        if options.only in (None, "qwen"):
            good &= print_qwen_table(Path(scratch))
        if cells and options.only in (None, "cpu"):
            good &= print_cpu_table(Path(scratch), cells)
        if runs and options.only in (None, "long"):
            good &= print_long_table(Path(scratch), runs)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
