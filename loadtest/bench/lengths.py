"""How long prompts and answers are: fixed, in ranges, or as Punica draws them. Pure and seeded."""

import random
from dataclasses import dataclass
from typing import Protocol


class LengthsError(ValueError):
    """A text that names no lengths."""


class Lengths(Protocol):
    """Draws sizes of requests."""

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """Return (prompt tokens, answer tokens) of each of ``count`` requests. The same for a seed."""
        ...


@dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from ``low`` up to, but not including, ``high``; one number where both are equal."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Range":
        """Read "64" or "8:512". Raises LengthsError."""
        low, colon, high = text.partition(":")
        try:
            found = cls(int(low), int(high) if colon else int(low))
        except ValueError:
            raise LengthsError(f"{text!r} is neither a number of tokens nor LOW:HIGH") from None
        if found.low < 1 or found.high < found.low:
            raise LengthsError(f"{text!r}: lengths begin at 1, and HIGH is at least LOW")
        return found

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        return self.low if self.high <= self.low + 1 else rng.randrange(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}" if self.high == self.low else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class Uniform:
    """Both lengths uniform in a range of their own (S-LoRA: [8, 512) each)."""

    prompt: Range
    answer: Range

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """See Lengths."""
        rng = random.Random(f"{seed}/lengths")
        return [(self.prompt.draw(rng), self.answer.draw(rng)) for _ in range(count)]

    def __str__(self) -> str:
        return f"prompts of about {self.prompt} tokens, {self.answer} tokens out"


@dataclass(frozen=True, slots=True)
class Punica:
    """Punica's text generation (benchmarks/bench_textgen.py): log-normal prompts, uniform totals.

    A prompt has −1 + 18·exp(0.8·z) tokens, z normal, at least 1 and at most ``most`` − 2; prompt and answer together
    a whole number uniform below ``most``, but at least two tokens more than the prompt.
    """

    most: int = 2048

    def draw(self, count: int, seed: int) -> list[tuple[int, int]]:
        """See Lengths."""
        rng = random.Random(f"{seed}/lengths")
        drawn = []
        for _ in range(count):
            prompt = max(1, min(self.most - 2, int(-1 + 18 * rng.lognormvariate(0, 0.8))))
            drawn.append((prompt, max(prompt + 2, rng.randrange(self.most)) - prompt))
        return drawn

    def __str__(self) -> str:
        return f"Punica's lengths up to {self.most} tokens"
