"""What the bars serve and ask: a small random base, random adapters, prompts. The same on every run."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    ATTENTION,
    TINY,
    AdapterShape,
    write_adapter,
    write_base,
)

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

    @classmethod
    def make(cls, directory: Path) -> "Material":
        """Write the base."""
        return cls(write_base(directory / "base"), directory / "adapters")

    def adapter(self, number: int, rank: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> str:
        """Write adapter ``number``, if it isn't there, and return its source: a path below the root."""
        source = f"{number}-r{rank}-{len(targets)}"
        if not (self.adapters / source).is_dir():
            shape = AdapterShape(rank=rank, alpha=2.0 * rank, targets=targets, seed=number)
            write_adapter(self.adapters / source, self.base, shape)
        return source

    def mixed(self, count: int) -> list[str]:
        """Return ``count`` adapters whose ranks and targets differ."""
        return [
            self.adapter(number, RANKS[number % len(RANKS)], TARGETS[number % len(TARGETS)])
            for number in range(count)
        ]

    def arguments(self, *more: str, quantization: str = "none") -> list[str]:
        """Return the flags of a server that serves this exactly, and small."""
        return [
            *("--adapter-root", str(self.adapters), "--dtype", "float32", "--quantization", quantization),
            *("--threads", "1", "--log-level", "warning", "--audit-after", str(AUDIT_AFTER), *more),
        ]


def prompts(lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Return random prompts of these lengths."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(VOCABULARY) for _ in range(length)) for length in lengths]
