"""`python -m manylora.demo.tool_training`: trains the adapter that calls functions, on the base here.

The other adapters are trained by loops of the demo's own; this one as anybody would train one, by `manylora train`: a
file of data, one command. Writes adapters/tools/ beside this file, or below the directory that is given.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from manylora.demo.finetune import BASE_NAME, load_4bit
from manylora.demo.heldout_calls import held_out_questions, turns_right
from manylora.demo.tool_data import write_conversations

NAME = "tools"
RANK = 16
STEPS, ROWS = 1000, 4
LENGTH = 512
"""Tokens of a row, into which about three conversations go."""
CONVERSATIONS = 8_000
FLAGS = {
    "lora_r": RANK,
    "lora_alpha": 2 * RANK,
    "lora_dropout": 0,
    "learning_rate": 5e-3,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "packing": True,
    "model_max_length": LENGTH,
    "bf16": True,
    "data_check": "off",
    "logging_steps": 50,
    "save_strategy": "no",
}


def train_tools(base: Path, out: Path, seed: int) -> None:
    """Write the adapter's two files into `out`. Raises CalledProcessError if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        data, made = Path(folder) / "conversations.jsonl", Path(folder) / "made"
        write_conversations(data, CONVERSATIONS, seed)
        flags = [text for name, value in FLAGS.items() for text in (f"--{name}", str(value))]
        paths = ["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(made)]
        train = [sys.executable, "-m", "manylora", "train", *paths, "--use_lora", "--q_lora"]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums come in one order, on any number of cores
        command = [*train, *flags, "--seed", str(seed), "--live", "False"]
        subprocess.run(command, check=True, env=one_thread)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "adapter_model.safetensors", out)
        config = json.loads((made / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = BASE_NAME
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def shares_right(base: Path, adapter: Path) -> str:
    """Say how much of what is held out the adapter gets right."""
    model = PeftModel.from_pretrained(load_4bit(base).dequantize(), adapter)
    model.eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    shares = turns_right(model, tokenizer, held_out_questions())
    told = ", ".join(f"{share:.1%} of its {kind}" for kind, share in sorted(shares.items()))
    return f"{NAME}: rank {RANK}, {told} exactly right on held-out questions"


def main() -> None:
    """Train, and print how well it went."""
    parser = argparse.ArgumentParser(prog="python -m manylora.demo.tool_training", description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here, help="where to write; default: demo/")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    adapter = given.out / "adapters" / NAME
    train_tools(here / "base", adapter, given.seed)
    Console().print(shares_right(here / "base", adapter), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
