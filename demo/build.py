"""`python -m manylora.demo.build`: makes the demo's data and trains tokenizer, base and adapters from nothing.

Writes base/, adapters/NAME/ and heldout.jsonl beside this file, or below the directory that is given. Everything is
seeded; the same machine gives the same files.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from manylora.demo.finetune import RECIPES, load_4bit, save_adapter, train_adapter
from manylora.demo.forms import ADAPTERS
from manylora.demo.heldout import exact_match, held_out_prompts, write_prompts
from manylora.demo.manifests import write_manifests
from manylora.demo.pretrain import Report, pretrain
from manylora.demo.tables import Question
from manylora.demo.tokenizer import train_tokenizer
from manylora.demo.tool_training import NAME, shares_right, train_tools

SEED = 1
THREADS = 1
"""Matrices this small gain little from a second thread, and the files don't depend on the number of cores."""


def build(folder: Path, report: Report) -> None:
    """Make everything below `folder`, in place of what an earlier build left there."""
    base, adapters = folder / "base", folder / "adapters"
    for old in (base, adapters):
        shutil.rmtree(old, ignore_errors=True)
    tokenizer = train_tokenizer()
    model = pretrain(tokenizer, SEED, report)
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    prompts = held_out_prompts()
    write_prompts(prompts, folder / "heldout.jsonl")
    asked = {name: [prompt.question for prompt in prompts if prompt.adapter == name] for name in ADAPTERS}
    _report_base(base, tokenizer, asked, report)
    for recipe in RECIPES:
        adapter: PeftModel = train_adapter(base, tokenizer, recipe, SEED)
        adapter.eval()
        save_adapter(adapter, adapters / recipe.form)
        share = exact_match(adapter, tokenizer, asked[recipe.form], recipe.form)
        report(f"{recipe.form}: rank {recipe.rank}, {share:.1%} of its held-out answers exactly right")
    train_tools(base, adapters / NAME, SEED)
    write_manifests(folder)
    report(shares_right(base, adapters / NAME))


def _report_base(
    base: Path, tokenizer: PreTrainedTokenizerFast, asked: dict[str, list[Question]], report: Report
) -> None:
    model = load_4bit(base)
    model.eval()
    for form, questions in asked.items():
        own, other = (exact_match(model, tokenizer, questions, each) for each in ("plain", form))
        report(f"base on the prompts of {form}: {own:.1%} right as a plain sentence, {other:.1%} as {form}")


def main() -> None:
    """Build, and print what happens with the time since the start."""
    parser = argparse.ArgumentParser(prog="python -m manylora.demo.build", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="where to write; default: demo/"
    )
    console, start = Console(), time.monotonic()

    def report(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        console.print(f"{minutes:3d}:{seconds:02d}  {line}", highlight=False, soft_wrap=True)

    torch.set_num_threads(THREADS)
    build(parser.parse_args().out, report)
    report("done")


if __name__ == "__main__":
    main()
