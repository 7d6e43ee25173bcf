"""What a kind of hostile request is: a pure function from randomness and a scene to what its connections do."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from manylora.loadtest.checks.bars.hostile.exchange import Exchange

Plan = tuple[tuple[Exchange, ...], ...]
"""Stages one after the other; the exchanges of one stage at the same time."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a hostile client knows of the server, and its number, from which it makes names that nobody else has."""

    number: int
    models: tuple[str, ...]
    """The base and the adapters that the well-behaved ask."""
    sources: tuple[str, ...]
    """Hostile adapters below the root, by kind: "huge-…", "pattern-…"."""

    def of_kind(self, prefix: str) -> tuple[str, ...]:
        """Return the sources that begin so."""
        return tuple(source for source in self.sources if source.startswith(f"{prefix}-"))

    def name(self, tag: str) -> str:
        """Return a name of this client's own."""
        return f"{tag}-{self.number}"


Kind = Callable[[Random, Scene], Plan]
