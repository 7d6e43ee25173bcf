"""How near the native CPU kernels stay to plain torch: `python -m manylora.loadtest.checks.fidelity BASE`.

Both hold the same weights; the native ones multiply them by activations of 8 bits. Next-token distributions are
compared over prose, long docstrings of the standard library and numpy: mean KL(plain ‖ native), how often the most
likely token is the same, and both perplexities. Exit status 1 if a bar is missed. The model should be a real one: what
noise is worth says nothing.
"""

import argparse
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from manylora.loadtest.material.by_hand import BLOCKS_EACH, Row, load, step
from manylora.loadtest.material.engines import BLOCK
from manylora.loadtest.material.text_table import text_table
from manylora.server.kernels.choose import choose_backend
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.served import ServedModel

MODULES = (
    "statistics",
    "decimal",
    "argparse",
    "logging",
    "email.message",
    "typing",
    "random",
    "fractions",
    "heapq",
    "shutil",
    "tempfile",
    "textwrap",
    "difflib",
    "calendar",
    "numpy",
)
SHORTEST, TEXTS = 800, 20
CONTEXT = BLOCK * BLOCKS_EACH
MOST_KL, LEAST_SAME, MOST_PERPLEXITY = 0.004, 0.96, 0.005
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Of one form of the weights, over all positions."""

    positions: int
    kl: float
    """Nats."""
    same: float
    """Share of positions with the same most likely token."""
    plain: float
    """Perplexity."""
    native: float

    @property
    def holds(self) -> bool:
        """Whether all bars are met."""
        worse = self.native / self.plain - 1
        return self.kl <= MOST_KL and self.same >= LEAST_SAME and worse <= MOST_PERPLEXITY


def texts() -> list[str]:
    """Return prose that every installation has."""
    found: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there for older programs
            docs = [getattr(each, "__doc__", None) for each in _own(module)]
        found += [inspect.cleandoc(doc) for doc in docs if isinstance(doc, str) and len(doc) > SHORTEST]
    return found


def _own(module: ModuleType) -> Iterator[object]:
    return (value for value in vars(module).values() if inspect.getmodule(value) is module)


def distributions(model: ServedModel, prompts: Sequence[list[int]]) -> Iterator[Tensor]:
    """Yield log probabilities float32 [tokens, vocab] of each prompt."""
    for ids in prompts:
        row = Row(0, ids)
        step(model, [(row, len(ids))])
        yield torch.log_softmax(row.all_logits(), -1)


def measure(plain: ServedModel, native: ServedModel, prompts: Sequence[list[int]]) -> Fidelity:
    """Compare the two over all positions of the prompts."""
    count, sums = 0, np.zeros(4)
    both = zip(prompts, distributions(plain, prompts), distributions(native, prompts), strict=True)
    for ids, theirs, ours in both:
        following = torch.tensor(ids[1:])[:, None]
        sums += (
            (theirs.exp() * (theirs - ours)).sum().item(),
            (theirs.argmax(-1) == ours.argmax(-1)).sum().item(),
            -theirs[:-1].gather(1, following).sum().item(),
            -ours[:-1].gather(1, following).sum().item(),
        )
        count += len(ids)
    followed = count - len(prompts)
    return Fidelity(
        count,
        float(sums[0]) / count,
        float(sums[1]) / count,
        math.exp(sums[2] / followed),
        math.exp(sums[3] / followed),
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="directory of a real model")
    parser.add_argument(
        "--quantization",
        nargs="+",
        default=["nf4", "int8"],
        help="nf4, int8, none; auto: as the files hold it",
    )
    parser.add_argument("--texts", type=int, default=TEXTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    prompts = [tokenizer(text)["input_ids"][:CONTEXT] for text in texts()[: options.texts]]
    rows, held = [], True
    for form in options.quantization:
        # Quantised from the same values: a native backend rounds what isn't quantised to bfloat16.
        dtype = torch.bfloat16 if form == "none" else torch.float32
        native = choose_backend(CPU, dtype)
        if isinstance(native, PlainBackend):
            sys.exit(native.description)
        plain = load(options.base, PlainBackend(CPU, torch.float32), 1, form)
        found = measure(plain, load(options.base, native, 1, form), prompts)
        held &= found.holds
        rows.append(
            [
                form,
                str(found.positions),
                f"{found.kl:.4f}",
                f"{found.same:.1%}",
                f"{found.plain:.3f}",
                f"{found.native:.3f}",
                "holds" if found.holds else "MISSED",
            ]
        )
    bars = f"KL at most {MOST_KL}, same at least {LEAST_SAME:.0%}, perplexity at most {MOST_PERPLEXITY:.1%} higher"
    print(f"{native.description}; {bars}\n")  # noqa: T201  # the result
    head = ["weights", "positions", "mean KL", "same top token", "perplexity, plain", "native", ""]
    print(text_table(head, rows))  # noqa: T201  # the result
    return not held


if __name__ == "__main__":
    sys.exit(main())
