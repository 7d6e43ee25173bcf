"""How near the native CPU kernels stay to plain torch: `python -m manylora.loadtest.checks.fidelity BASE`.

Both hold the same weights; the native ones multiply them by activations of 8 bits, or of bfloat16. Next-token
distributions are compared over prose, long docstrings of the standard library and numpy: mean KL(plain ‖ native), how
often the most likely token is the same, and both perplexities. Then the native ones with keys and values in 8 bits are
held against themselves with keys and values in bfloat16. Exit status 1 if a bar is missed. The model should be a real
one: what noise is worth says nothing.
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
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Bars:
    """What may be lost."""

    kl: float
    """Nats, at most."""
    same: float
    """Share, at least."""
    perplexity: float
    """By which share it may rise."""

    def __str__(self) -> str:
        """Say it in a line."""
        return f"KL at most {self.kl}, same at least {self.same:.0%}, perplexity at most {self.perplexity:.1%} higher"


BARS: Mapping[Activations, Bars] = {
    "int8": Bars(0.004, 0.96, 0.005),
    "bfloat16": Bars(0.001, 0.96, 0.005),
}
"""Of native kernels beside plain torch."""
KV_INT8 = Bars(0.005, 0.96, 0.005)
"""Of keys and values in 8 bits beside those in bfloat16. With activations of 8 bits the least change rounds others."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Of one model beside another, over all positions."""

    positions: int
    kl: float
    """Nats."""
    same: float
    """Share of positions with the same most likely token."""
    theirs: float
    """Perplexity."""
    ours: float

    def holds(self, bars: Bars) -> bool:
        """Whether all are met."""
        worse = self.ours / self.theirs - 1
        return self.kl <= bars.kl and self.same >= bars.same and worse <= bars.perplexity

    def cells(self, bars: Bars) -> list[str]:
        """Return the table's cells."""
        return [
            str(self.positions),
            f"{self.kl:.4f}",
            f"{self.same:.1%}",
            f"{self.theirs:.3f}",
            f"{self.ours:.3f}",
            "holds" if self.holds(bars) else "MISSED",
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


def measure(one: ServedModel, other: ServedModel, prompts: Sequence[list[int]]) -> Fidelity:
    """Compare the other with the one over all positions of the prompts."""
    count, sums = 0, np.zeros(4)
    both = zip(prompts, distributions(one, prompts), distributions(other, prompts), strict=True)
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


def compare(
    base: Path, form: Quantization, activations: Activations, prompts: Sequence[list[int]]
) -> Iterator[tuple[list[str], Fidelity, Bars]]:
    """Load the base in a form on each side; yield what is held in which type, how near it is, and the bars."""
    # Quantised from the same values: a native backend rounds what isn't quantised to bfloat16.
    dtype = torch.bfloat16 if form == "none" else torch.float32
    backend = choose_backend(CPU, dtype, activations=activations)
    if isinstance(backend, PlainBackend):
        sys.exit(backend.description)
    native, plain = load(base, backend, 1, form), load(base, PlainBackend(CPU, torch.float32), 1, form)
    yield [form, activations, "bfloat16"], measure(plain, native, prompts), BARS[activations]
    del plain
    kept = load(base, choose_backend(CPU, dtype, activations=activations, kv_dtype=torch.int8), 1, form)
    yield [form, activations, "int8"], measure(native, kept, prompts), KV_INT8


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
    parser.add_argument("--activations", nargs="+", choices=[*BARS], default=[*BARS])
    parser.add_argument("--texts", type=int, default=TEXTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    prompts = [tokenizer(text)["input_ids"][:CONTEXT] for text in texts()[: options.texts]]
    found = [
        each
        for form, activations in product(options.quantization, options.activations)
        for each in compare(options.base, form, activations, prompts)
    ]
    print(choose_backend(CPU, torch.float32).description)  # noqa: T201  # the result
    for activations in options.activations:
        print(f"{activations} activations beside plain torch: {BARS[activations]}")  # noqa: T201  # the result
    print(f"keys and values in 8 bits beside those in bfloat16: {KV_INT8}\n")  # noqa: T201  # the result
    head = ["weights", "activations", "keys, values", "positions", "mean KL", "same top token"]
    head += ["perplexity, one", "other", ""]
    rows = [[*names, *fidelity.cells(bars)] for names, fidelity, bars in found]
    print(text_table(head, rows))  # noqa: T201  # the result
    return not all(fidelity.holds(bars) for _, fidelity, bars in found)


if __name__ == "__main__":
    sys.exit(main())
