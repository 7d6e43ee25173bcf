"""Qwen's published memory of fine-tuning, row by row, beside what `manylora plan --recipe qwen` says.

The figures are the README's of github.com/QwenLM/Qwen, "Profiling of Memory and Speed": one A100-SXM4-80G, CUDA 11.8,
PyTorch 2.0, flash attention 2, batch 1, accumulation 8, its finetune.py's r = 64 and gradient checkpointing; GB (10⁹).
A widely read guide shows a table of the same source with its rows mislabelled: 11.5 GB there is "7B LoRA" and here 7B
Q-LoRA; 61.4 is no LoRA of 72B but its Q-LoRA.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from manylora.loadtest.material.text_table import text_table

GB = 1e9
GIB = 1 << 30
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Shape:
    """A first Qwen, as its config.json has it: ``width`` is twice what its MLP is wide."""

    hidden: int
    layers: int
    width: int
    vocabulary: int

    def config(self) -> dict[str, object]:
        """Return the keys of config.json that sizes are read from."""
        return {
            "model_type": "qwen",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 128,
            "kv_channels": 128,
            "intermediate_size": self.width,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }


SHAPES = {
    "1.8B": Shape(2048, 24, 11008, 151936),
    "7B": Shape(4096, 32, 22016, 151936),
    "14B": Shape(5120, 40, 27392, 152064),
    "72B": Shape(8192, 80, 49152, 152064),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: GB by length."""

    model: str
    method: str
    measured: tuple[float, ...]
    fitted: bool
    """Whether the plan's constants were fitted to it. The others are the check on them."""


ROWS = (
    Row("1.8B", "LoRA", (6.7, 7.4, 8.4, 11.0, 16.2, 21.8), True),
    Row("1.8B", "Q-LoRA", (5.8, 6.0, 6.6, 7.8, 10.2, 15.8), True),
    Row("7B", "LoRA", (20.1, 20.4, 21.5, 23.8, 29.7, 36.6), True),
    Row("7B", "LoRA (emb)", (33.7, 34.1, 35.2, 35.1, 39.2, 48.5), True),
    Row("7B", "Q-LoRA", (11.5, 11.5, 12.3, 13.9, 16.9, 23.5), True),
    Row("1.8B", "LoRA (emb)", (13.7, 14.0, 14.0, 15.1, 19.7, 27.7), False),
    Row("14B", "LoRA", (34.6, 35.1, 35.3, 37.4, 42.5, 55.2), False),
    Row("14B", "LoRA (emb)", (51.2, 51.1, 51.5, 54.1, 56.8, 67.7), False),
    Row("14B", "Q-LoRA", (18.7, 18.4, 18.9, 19.9, 23.0, 27.9), False),
    Row("72B", "Q-LoRA", (61.4, 61.4, 62.9, 64.1, 68.0, 75.6), False),
)
"""All rows of the table with one GPU, but for full-parameter training."""


def predict(row: Row, length: int, directory: Path) -> float:
    """Return the plan's GB, by the command that a user runs."""
    config = directory / f"{row.model}.json"
    config.write_text(json.dumps(SHAPES[row.model].config()))
    words = [
        *(sys.executable, "-m", "manylora", "plan", str(config), "--recipe", "qwen", "--json"),
        *(
            "--seq",
            str(length),
            "--batch",
            "1",
            "--accumulation",
            "8",
            "--rank",
            "64",
            "--gradient-checkpointing",
        ),
        *("--method", "qlora" if row.method == "Q-LoRA" else "lora"),
        *(["--train-embeddings"] if "emb" in row.method else []),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["total_gib"]) * GIB / GB


def print_qwen_table(directory: Path) -> bool:
    """Print measured and planned of every cell; return whether all are within 15 %."""
    lines: list[list[str]] = []
    errors: dict[bool, list[float]] = {True: [], False: []}
    for row in ROWS:
        planned = [predict(row, length, directory) for length in LENGTHS]
        off = [plan / real - 1 for plan, real in zip(planned, row.measured, strict=True)]
        errors[row.fitted] += off
        cells = [f"{m:.1f}/{p:.1f} {e:+.0%}" for m, p, e in zip(row.measured, planned, off, strict=True)]
        lines.append([f"{row.model} {row.method}", "fitted" if row.fitted else "held out", *cells])
    heads = ["measured/planned GB", "", *map(str, LENGTHS)]
    print(text_table(heads, lines))  # noqa: T201  # the result
    for fitted, name in ((True, "fitted rows"), (False, "held-out rows")):
        print(f"{name}: {summary(errors[fitted])}")  # noqa: T201  # the result
    return max(map(abs, errors[True] + errors[False])) <= 0.15


def summary(errors: Sequence[float]) -> str:
    """Return worst and mean of relative errors, in words."""
    sizes = [abs(error) for error in errors]
    return f"worst {max(sizes):.1%}, mean {fmean(sizes):.1%} off ({len(sizes)} cells)"
