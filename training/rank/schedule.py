"""When an adapter's rank grows: ``8:0,16:0.3,64:0.6`` is rank 8, then 16 from 30 % of the steps on, 64 from 60 %."""

from dataclasses import dataclass
from typing import Self

from manylora.training.errors import InvalidArgument

_EXPECTED = "expected rank:share pairs such as 8:0,16:0.3,64:0.6"


@dataclass(frozen=True, slots=True)
class RankStage:
    """A rank and the share of the run's optimiser steps from which on it holds."""

    rank: int
    share: float


@dataclass(frozen=True, slots=True)
class RankSchedule:
    """The stages of a run. The first begins at share 0; ranks and shares increase strictly; shares are below 1."""

    stages: tuple[RankStage, ...]

    def __post_init__(self) -> None:
        """Raise InvalidArgument for stages that nothing can be trained by."""
        if not self.stages or self.stages[0].share != 0:
            raise InvalidArgument(
                f"--rank_schedule {self}: the first stage must begin at share 0; {_EXPECTED}."
            )
        if any(stage.rank < 1 for stage in self.stages):
            raise InvalidArgument(f"--rank_schedule {self}: a rank is at least 1; {_EXPECTED}.")
        if not all(0 <= stage.share < 1 for stage in self.stages):
            raise InvalidArgument(f"--rank_schedule {self}: a share is at least 0 and below 1; {_EXPECTED}.")
        for earlier, later in zip(self.stages, self.stages[1:], strict=False):
            if later.rank <= earlier.rank:
                raise InvalidArgument(
                    f"--rank_schedule {self}: rank {later.rank} follows rank {earlier.rank}, but ranks must grow; "
                    "take --rank_schedule adalora:… for a budget that shrinks."
                )
            if later.share <= earlier.share:
                raise InvalidArgument(
                    f"--rank_schedule {self}: share {later.share:g} follows share {earlier.share:g}, "
                    f"but shares must increase; {_EXPECTED}."
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``rank:share,rank:share,…``. Raises InvalidArgument."""
        return cls(tuple(_parse_stage(part, text) for part in text.split(",")))

    @property
    def initial_rank(self) -> int:
        """The rank at step 0."""
        return self.stages[0].rank

    @property
    def final_rank(self) -> int:
        """The rank at the end."""
        return self.stages[-1].rank

    def stage_at(self, step: int, total_steps: int) -> int:
        """Return the index of the stage that holds in the step after ``step`` finished ones out of ``total_steps``."""
        return max(i for i, stage in enumerate(self.stages) if step >= stage.share * total_steps)

    def __str__(self) -> str:
        """Return what ``parse`` reads."""
        return ",".join(f"{stage.rank}:{stage.share!r}".removesuffix(".0") for stage in self.stages)


def _parse_stage(part: str, text: str) -> RankStage:
    rank, colon, share = part.strip().partition(":")
    try:
        if not colon:
            raise ValueError
        return RankStage(int(rank), float(share))
    except ValueError:
        raise InvalidArgument(
            f"--rank_schedule {text}: {part.strip()!r} isn't a stage; {_EXPECTED}."
        ) from None
