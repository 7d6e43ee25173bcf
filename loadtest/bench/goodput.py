"""Whether requests kept to a service level, and how many a second did. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from manylora.loadtest.material.answer import Answer

PARTS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Seconds that a request may take; None: any."""

    ttft: float | None = None
    """To its first token, from when it was due."""
    tpot: float | None = None
    """A token after the first, on average over the answer."""
    e2e: float | None = None
    """To its end, from when it was due."""

    @classmethod
    def parse(cls, text: str) -> "ServiceLevel":
        """Read "ttft:2000,tpot:100,e2e:30000", in ms. Raises ValueError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition(":")
            try:
                value = float(number)
            except ValueError:
                value = -1.0
            if name not in PARTS or name in limits or not value > 0:
                raise ValueError(f"{part!r} is no limit in ms as ttft:2000, tpot:100 or e2e:30000, each once")
            limits[name] = value / 1000
        return cls(**limits)

    def __str__(self) -> str:
        named = [(name, getattr(self, name)) for name in PARTS]
        return ", ".join(f"{name} ≤ {1000 * value:g} ms" for name, value in named if value is not None)

    def met_by(self, answer: Answer) -> bool:
        """Whether a request kept to it; one that failed did not."""
        if answer.error is not None:
            return False
        measured = (answer.first_token_seconds, answer.seconds_per_token, answer.seconds)
        limits = (self.ttft, self.tpot, self.e2e)
        return all(
            limit is None or (value is not None and value <= limit)
            for limit, value in zip(limits, measured, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Goodput:
    """How a run kept to its service level."""

    level: ServiceLevel
    met: int
    requests: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Requests a second that kept to it."""
        return self.met / self.seconds

    @property
    def attainment(self) -> float:
        """Their share of all, failed ones included."""
        return self.met / self.requests if self.requests else 0.0

    @classmethod
    def of(cls, level: ServiceLevel, answers: Sequence[Answer], seconds: float) -> "Goodput":
        """Count."""
        return cls(level, sum(map(level.met_by, answers)), len(answers), seconds)
