"""How AdaLoRA's rank budget falls: ``adalora:12:8``, or ``adalora:12:8:0.1:0.3:10`` with when and how often it does."""

from dataclasses import dataclass
from typing import Self

from manylora.training.errors import InvalidArgument

PREFIX = "adalora:"
_EXPECTED = (
    "expected adalora:FIRST_RANK:AVERAGE_RANK, as adalora:12:8, or with the shares of the run before and after the "
    "budget falls and the steps between two cuts, as adalora:12:8:0.1:0.3:10"
)


@dataclass(frozen=True, slots=True)
class AdaLoraBudget:
    """How the rank budget falls over a run."""

    first_rank: int
    average_rank: int
    """Of all modules, once the budget has fallen."""
    warmup_share: float = 0.1
    """Of the run's steps, at first, with the whole budget."""
    final_share: float = 0.3
    """Of the run's steps, at last, with the budget that is left."""
    interval: int | None = None
    """Steps between two cuts; None: a hundredth of the run."""

    def __post_init__(self) -> None:
        """Raise InvalidArgument for a budget that doesn't fall or has no time to."""
        if not 1 <= self.average_rank < self.first_rank:
            raise InvalidArgument(
                f"--rank_schedule {self}: the average rank at the end is at least 1 and below the first; {_EXPECTED}."
            )
        shares = (self.warmup_share, self.final_share)
        if not (all(share >= 0 for share in shares) and sum(shares) < 1):
            raise InvalidArgument(
                f"--rank_schedule {self}: the two shares must leave time between them; {_EXPECTED}."
            )
        if self.interval is not None and self.interval < 1:
            raise InvalidArgument(
                f"--rank_schedule {self}: at least 1 step lies between two cuts; {_EXPECTED}."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``adalora:first:average[:warmup:final[:interval]]``. Raises InvalidArgument."""
        parts = text.removeprefix(PREFIX).split(":")
        try:
            match parts:
                case [first, average]:
                    return cls(int(first), int(average))
                case [first, average, warmup, final]:
                    return cls(int(first), int(average), float(warmup), float(final))
                case [first, average, warmup, final, interval]:
                    return cls(int(first), int(average), float(warmup), float(final), int(interval))
        except ValueError:
            pass
        raise InvalidArgument(f"--rank_schedule {text}: {_EXPECTED}.")

    def __str__(self) -> str:
        """Return what ``parse`` reads."""
        interval = "" if self.interval is None else f":{self.interval}"
        return f"{PREFIX}{self.first_rank}:{self.average_rank}:{self.warmup_share!r}:{self.final_share!r}{interval}"

    def peft_fields(self, total_steps: int) -> dict[str, int]:
        """Return peft's fields for a run. Raises InvalidArgument for one that is too short."""
        warmup, final = round(self.warmup_share * total_steps), round(self.final_share * total_steps)
        if warmup >= total_steps - final:
            raise InvalidArgument(
                f"--rank_schedule {self}: {total_steps} steps are too few for the budget to fall in; train for longer."
            )
        interval = self.interval or max(1, total_steps // 100)
        return {
            "init_r": self.first_rank,
            "target_r": self.average_rank,
            "tinit": warmup,
            "tfinal": final,
            "deltaT": interval,
            "total_step": total_steps,
        }
