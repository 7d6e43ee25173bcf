"""From the text of ``--rank_schedule`` to the policy of a run."""

from manylora.training.rank.adalora import AdaLoraRank
from manylora.training.rank.budget import PREFIX, AdaLoraBudget
from manylora.training.rank.fixed import FixedRank
from manylora.training.rank.growing import GrowingRank
from manylora.training.rank.policy import RankPolicy
from manylora.training.rank.schedule import RankSchedule


def make_policy(text: str | None, base_rank: int, *, seed: int = 42) -> RankPolicy:
    """Return the policy for ``--rank_schedule text``; without one, the rank is ``base_rank`` all along.

    A schedule's ranks take the place of ``base_rank``; ``seed`` draws the rows of a growth. Raises InvalidArgument.
    """
    if text is None:
        return FixedRank(base_rank)
    if text.startswith(PREFIX):
        return AdaLoraRank(AdaLoraBudget.parse(text))
    return GrowingRank(RankSchedule.parse(text), seed=seed)
