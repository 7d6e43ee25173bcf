"""A rank schedule says what it means, or in one line why it means nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.training.errors import InvalidArgument
from manylora.training.rank.schedule import RankSchedule, RankStage


@st.composite
def schedules(draw: st.DrawFn) -> RankSchedule:
    ranks = draw(st.sets(st.integers(1, 512), min_size=1, max_size=6))
    later = st.floats(0, 1, exclude_min=True, exclude_max=True)
    shares = draw(st.sets(later, min_size=len(ranks) - 1, max_size=len(ranks) - 1))
    pairs = zip(sorted(ranks), [0.0, *sorted(shares)], strict=True)
    return RankSchedule(tuple(RankStage(rank, share) for rank, share in pairs))


@given(schedules())
def test_a_schedule_is_read_back_from_its_text(schedule: RankSchedule) -> None:
    assert RankSchedule.parse(str(schedule)) == schedule


@given(schedules(), st.integers(1, 5000))
def test_ranks_never_fall_and_a_stage_begins_at_its_share(schedule: RankSchedule, total: int) -> None:
    stages = [schedule.stage_at(step, total) for step in range(min(total, 200))]
    assert stages[0] == 0
    assert stages == sorted(stages)
    for step, stage in enumerate(stages):
        assert schedule.stages[stage].share <= step / total
        assert all(step / total < later.share for later in schedule.stages[stage + 1 :])


def test_a_share_of_a_round_number_of_steps_begins_at_that_step() -> None:
    schedule = RankSchedule.parse("4:0,8:0.7")
    assert [schedule.stage_at(step, 10) for step in (6, 7)] == [0, 1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "isn't a stage"),
        ("8", "'8' isn't a stage"),
        ("8:0,,16:0.3", "'' isn't a stage"),
        ("8:zero", "isn't a stage"),
        ("8:0.1,16:0.3", "must begin at share 0"),
        ("0:0,16:0.3", "at least 1"),
        ("8:0,16:1", "below 1"),
        ("8:0,16:nan", "below 1"),
        ("16:0,8:0.5", "rank 8 follows rank 16"),
        ("8:0,8:0.5", "rank 8 follows rank 8"),
        ("8:0,16:0.5,32:0.5", "share 0.5 follows share 0.5"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as refusal:
        RankSchedule.parse(text)
    assert "\n" not in str(refusal.value)
    assert f"--rank_schedule {text}:" in str(refusal.value)
