"""What the bars serve and ask: a small random base, random adapters, prompts. The same on every run."""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    ATTENTION,
    TINY,
    AdapterShape,
    write_adapter,
    write_base,
)
from manylora.server.kernels.choose import PLAIN, sound_kernels
from manylora.server.kernels.cpu.library import KernelsRefused, Unavailable

AUDIT_AFTER = 0.2
"""Idle seconds after which the servers check the books of their pools."""
VOCABULARY = TINY.vocab_size - 3
"""Ids that are not control tokens."""
RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
TARGETS = (("q_proj", "v_proj"), ATTENTION, ALL_LINEAR, ("gate_proj", "down_proj"))


@dataclass(frozen=True, slots=True)
class Material:
    """A base and the directory that adapters are written to; the server's adapter root."""

    base: Path
    adapters: Path
    kernels: str
    """What the servers compute with: see level_of."""

    @classmethod
    def make(cls, directory: Path, kernels: str = PLAIN, *, tied: bool = True) -> "Material":
        """Write the base; ``tied``: its head is its embedding."""
        base = write_base(directory / "base", replace(TINY, tied=tied))
        return cls(base, directory / "adapters", kernels)

    @property
    def native(self) -> bool:
        """Whether native kernels compute."""
        return self.kernels != PLAIN

    def adapter(self, number: int, rank: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> str:
        """Write adapter ``number``, if it isn't there, and return its source: a path below the root."""
        source = f"{number}-r{rank}-{len(targets)}"
        if not (self.adapters / source).is_dir():
            shape = AdapterShape(rank, 2.0 * rank, targets, seed=number)
            write_adapter(self.adapters / source, self.base, shape)
        return source

    def mixed(self, count: int) -> list[str]:
        """Return ``count`` adapters whose ranks and targets differ."""
        return [
            self.adapter(number, RANKS[number % len(RANKS)], TARGETS[number % len(TARGETS)])
            for number in range(count)
        ]

    def arguments(self, *more: str, quantization: str | None = None, threads: int = 1) -> list[str]:
        """Return the flags of a server that serves this small, computing as ``computing`` says."""
        return [
            *("--adapter-root", str(self.adapters), *computing(self.kernels, quantization)),
            *("--threads", str(threads), "--log-level", "warning", "--audit-after", str(AUDIT_AFTER), *more),
        ]


def computing(kernels: str, quantization: str | None = None) -> list[str]:
    """Return a server's flags: plain torch in float32, or native kernels in NF4, unless ``quantization`` says another.

    With float32 these quantise the values that the checkpoint has; what they compute with is their own affair.
    """
    usual = "none" if kernels == PLAIN else "nf4"
    return ["--kernels", kernels, "--dtype", "float32", "--quantization", quantization or usual]


def level_of(kernels: str) -> str:
    """Return what to name to a server: it must not choose another by itself. ``auto``: the fastest native level here.

    Raises KernelsRefused where that can't be had.
    """
    if kernels == PLAIN:
        return kernels
    found = sound_kernels(kernels)
    if isinstance(found, Unavailable):
        raise KernelsRefused(f"no native CPU kernels: {found.reason}")
    return found.level


def kernels_option(kernels: str) -> str:
    """Return level_of as argparse wants it."""
    try:
        return level_of(kernels)
    except KernelsRefused as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def prompts(lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Return random prompts of these lengths."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(VOCABULARY) for _ in range(length)) for length in lengths]
