"""From the text of ``--rank_schedule`` to the policy of a run."""

from training.errors import InvalidArgument
from training.rank.fixed import FixedRank
from training.rank.policy import RankPolicy


def make_policy(text: str | None, base_rank: int) -> RankPolicy:
    """Return the policy for ``--rank_schedule text``; without one, the rank is ``base_rank`` all along.

    A schedule's ranks take the place of ``base_rank``. Raises InvalidArgument.
    """
    if text is None:
        return FixedRank(base_rank)
    raise InvalidArgument(f"--rank_schedule {text} isn't supported; leave it out.")
