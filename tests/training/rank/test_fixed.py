"""Without a schedule, peft does what it does; the text of a schedule chooses the policy."""

from pathlib import Path

import pytest
import torch

from manylora.training.errors import InvalidArgument
from manylora.training.rank.adalora import AdaLoraRank
from manylora.training.rank.fixed import FixedRank
from manylora.training.rank.growing import GrowingRank
from manylora.training.rank.make import make_policy
from tests.training.rank.runs import Run, logits, small_adapter


@pytest.mark.parametrize(
    ("text", "kind", "ranks"),
    [
        (None, FixedRank, (64, 64)),
        ("4:0,8:0.5", GrowingRank, (4, 8)),
        ("adalora:12:8", AdaLoraRank, (12, 12)),
    ],
)
def test_the_text_chooses_the_policy(text: str | None, kind: type, ranks: tuple[int, int]) -> None:
    policy = make_policy(text, 64)
    assert isinstance(policy, kind)
    assert (policy.initial_rank, policy.final_rank) == ranks
    assert policy.rank == ranks[0]


def test_a_killed_run_resumed_equals_the_unbroken_one(tmp_path: Path) -> None:
    losses = Run.start(small_adapter(4), make_policy(None, 4), 10).train(until=10)
    killed = Run.start(small_adapter(4), make_policy(None, 4), 10)
    before = killed.train(until=5)
    killed.save(tmp_path)
    expected = logits(killed.model)
    resumed = Run.start(small_adapter(4), make_policy(None, 4), 10, checkpoint=tmp_path)
    assert torch.equal(logits(resumed.model), expected)
    assert before + resumed.train(until=10) == losses


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path) -> None:
    run = Run.start(small_adapter(4), make_policy(None, 4), 10)
    run.save(tmp_path)
    with pytest.raises(InvalidArgument, match="doesn't fit this run's adapter"):
        make_policy(None, 8).restore(small_adapter(8), tmp_path)
