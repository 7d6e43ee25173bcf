"""How evenly adapters are served: Jain's index, and who was served worst. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.summary import Spread


def jain(values: Sequence[float]) -> float:
    """Return Jain's index (Σx)² / (n·Σx²): 1 where all are equal, 1/n where one has everything; NaN of nothing."""
    squares = math.fsum(value * value for value in values)
    if not squares:
        return math.nan
    return math.fsum(values) ** 2 / (len(values) * squares)


@dataclass(frozen=True, slots=True)
class Share:
    """What one model's requests got."""

    model: str
    requests: int
    failed: int
    speed: float
    """Tokens for each second that its requests were waited for, failed ones included."""
    first_token: Spread
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Fairness:
    """How evenly the models were served that were asked at all."""

    shares: tuple[Share, ...]
    """The worst served first."""

    @property
    def index(self) -> float:
        """Jain's index over the models' speeds."""
        return jain([share.speed for share in self.shares])

    @property
    def worst(self) -> Share | None:
        """Who got the fewest tokens a second."""
        return self.shares[0] if self.shares else None

    @classmethod
    def of(cls, asked: Iterable[tuple[str, Answer]]) -> "Fairness":
        """Sum up by model."""
        by_model: dict[str, list[Answer]] = {}
        for model, answer in asked:
            by_model.setdefault(model, []).append(answer)
        return cls(tuple(sorted(_shares(by_model), key=lambda share: (share.speed, share.model))))

    def to_json(self) -> dict[str, object]:
        """Return the numbers as JSON values."""
        worst = self.worst
        return {
            "jain_index": None if math.isnan(self.index) else self.index,
            "worst": None if worst is None else worst.model,
            "models": {
                share.model: {
                    "requests": share.requests,
                    "failed": share.failed,
                    "tokens_per_second_waited": share.speed,
                    "first_token_seconds": share.first_token.to_json(),
                }
                for share in self.shares
            },
        }


def _shares(by_model: Mapping[str, Sequence[Answer]]) -> Iterable[Share]:
    for model, answers in by_model.items():
        waited = math.fsum(answer.seconds for answer in answers)
        good = [answer for answer in answers if answer.error is None]
        tokens = sum(answer.output_tokens for answer in good)
        firsts = Spread.of(t for t in (answer.first_token_seconds for answer in good) if t is not None)
        speed = tokens / waited if waited else 0.0
        yield Share(model, len(answers), len(answers) - len(good), speed, firsts)
