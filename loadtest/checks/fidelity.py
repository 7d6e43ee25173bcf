"""How near the native CPU kernels stay to plain torch: `python -m manylora.loadtest.checks.fidelity BASE`.

Both hold the same weights; the native ones multiply them by activations of 8 bits, or of bfloat16. Next-token
distributions are compared over prose, long docstrings of the standard library and numpy: mean KL(plain ‖ native), how
often the most likely token is the same, and both perplexities. Exit status 1 if a bar is missed. The model should be a
real one: what noise is worth says nothing.
"""

import argparse
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
from manylora.server.kernels.cpu.backend import Activations
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.loader import Quantization
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
MOST_KL: Mapping[Activations, float] = {"int8": 0.004, "bfloat16": 0.001}
LEAST_SAME, MOST_PERPLEXITY = 0.96, 0.005
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
    most_kl: float = MOST_KL["int8"]

    @property
    def holds(self) -> bool:
        """Whether all bars are met."""
        worse = self.native / self.plain - 1
        return self.kl <= self.most_kl and self.same >= LEAST_SAME and worse <= MOST_PERPLEXITY

    def cells(self) -> list[str]:
        """Return a line of the table."""
        return [
            str(self.positions),
            f"{self.kl:.4f}",
            f"{self.same:.1%}",
            f"{self.plain:.3f}",
            f"{self.native:.3f}",
            "holds" if self.holds else "MISSED",
        ]


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


def measure(
    plain: ServedModel,
    native: ServedModel,
    prompts: Sequence[list[int]],
    activations: Activations = "int8",
) -> Fidelity:
    """Compare the two over all positions of the prompts, for the bars of such activations."""
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
        MOST_KL[activations],
    )


def compare(
    base: Path, form: Quantization, activations: Activations, prompts: Sequence[list[int]]
) -> tuple[str, Fidelity]:
    """Load the base in a form twice; return what the native backend says of itself, and how near it is."""
    # Quantised from the same values: a native backend rounds what isn't quantised to bfloat16.
    dtype = torch.bfloat16 if form == "none" else torch.float32
    native = choose_backend(CPU, dtype, activations=activations)
    if isinstance(native, PlainBackend):
        sys.exit(native.description)
    plain = load(base, PlainBackend(CPU, torch.float32), 1, form)
    return native.description, measure(plain, load(base, native, 1, form), prompts, activations)


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
    parser.add_argument("--activations", nargs="+", choices=[*MOST_KL], default=[*MOST_KL])
    parser.add_argument("--texts", type=int, default=TEXTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    prompts = [tokenizer(text)["input_ids"][:CONTEXT] for text in texts()[: options.texts]]
    rows, held, description = [], True, ""
    for form, activations in product(options.quantization, options.activations):
        description, found = compare(options.base, form, activations, prompts)
        held &= found.holds
        rows.append([form, activations, *found.cells()])
    most = ", ".join(f"{kl} ({activations})" for activations, kl in MOST_KL.items())
    bars = (
        f"KL at most {most}, same at least {LEAST_SAME:.0%}, perplexity at most {MOST_PERPLEXITY:.1%} higher"
    )
    print(f"{description}; {bars}\n")  # noqa: T201  # the result
    head = [
        "weights",
        "activations",
        "positions",
        "mean KL",
        "same top token",
        "perplexity, plain",
        "native",
        "",
    ]
    print(text_table(head, rows))  # noqa: T201  # the result
    return not held


if __name__ == "__main__":
    sys.exit(main())
