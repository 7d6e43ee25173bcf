"""A name's versions: who is active, who is a canary, which way leads back, and which go first."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.adapters.errors import InvalidAdapter, UnknownVersion, VersionConflict
from manylora.adapters.lineage import Lineage
from manylora.adapters.records import AdapterRecord, AdapterState


def record(version: int) -> AdapterRecord:
    return AdapterRecord(
        version,
        "a",
        version,
        f"d{version}",
        "src",
        4,
        ("q_proj",),
        pinned=False,
        preload=False,
        created_at=datetime.now(UTC),
        state=AdapterState.PENDING,
    )


def born() -> Lineage:
    return Lineage((replace(record(1), state=AdapterState.ACTIVE),))


def put(lineage: Lineage, version: int) -> Lineage:
    return lineage.joined_by(record(version)).led_by(version, like=record(version))


def three() -> Lineage:
    return put(put(born(), 2), 3)


def states(lineage: Lineage) -> dict[int, str]:
    return {each.version: each.state.value for each in lineage.newest_first()}


def test_a_new_version_takes_over_and_the_old_ones_are_kept() -> None:
    found = three()
    assert states(found) == {3: "active", 2: "kept", 1: "kept"}
    assert found.way_back() == (3, 2, 1)


def test_going_back_leads_further_back_each_time() -> None:
    back = three().back_to(three().before().version)
    assert (back.active.version, back.way_back()) == (2, (2, 1))
    back = back.back_to(back.before().version)
    assert states(back) == {3: "kept", 2: "kept", 1: "active"}
    with pytest.raises(VersionConflict, match=r"none is kept; kept are 3, 2: name one"):
        back.before()
    with pytest.raises(VersionConflict, match="no version to go back to"):
        born().before()


def test_what_served_before_a_bad_version_is_what_it_leads_back_to() -> None:
    """And not the one with the number before, which was gone back from."""
    again = put(three().back_to(1), 4)
    assert again.way_back() == (4, 1)
    assert again.back_to(again.before().version).active.version == 1


def test_going_on_to_a_newer_version_is_a_way_back_too() -> None:
    on = three().back_to(1).back_to(3)
    assert on.way_back() == (3, 1)


def test_pins_go_with_the_name() -> None:
    pinned = born().joined_by(record(2)).led_by(2, like=replace(record(2), pinned=True, preload=True))
    back = pinned.back_to(1)
    assert {each.version: (each.pinned, each.preload) for each in back.records} == {
        1: (True, True),
        2: (False, False),
    }
    tried = pinned.joined_by(record(3)).trying(3, 0.5)
    assert not tried.get(3).pinned
    assert tried.promoted().active.pinned


def test_a_canary_is_promoted_or_kept() -> None:
    tried = born().joined_by(record(2)).trying(2, 0.25)
    assert states(tried) == {2: "canary", 1: "active"}
    assert tried.canary is not None
    assert tried.canary.share == 0.25
    assert states(tried.aborted()) == {2: "kept", 1: "active"}
    promoted = tried.promoted()
    assert (states(promoted), promoted.way_back()) == ({2: "active", 1: "kept"}, (2, 1))
    assert promoted.active.share is None
    with pytest.raises(VersionConflict, match="has no canary"):
        promoted.aborted()
    with pytest.raises(VersionConflict, match="has no canary"):
        promoted.promoted()


def test_an_older_version_may_be_a_canary_and_leads_back_to_who_it_took_over_from() -> None:
    assert three().trying(2, 1.0).promoted().way_back() == (2, 3, 1)


def test_a_change_of_the_active_version_ends_the_canary() -> None:
    tried = three().trying(2, 0.5)
    assert states(put(tried, 4)) == {4: "active", 3: "kept", 2: "kept", 1: "kept"}
    assert states(tried.back_to(1)) == {3: "kept", 2: "kept", 1: "active"}
    assert states(tried.trying(1, 0.1)) == {3: "active", 2: "kept", 1: "canary"}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(InvalidAdapter, match="from 0 to 1"):
        three().trying(1, share)
    assert [three().trying(1, edge).get(1).share for edge in (0, 1)] == [0, 1]


def test_what_is_active_can_be_neither_dropped_tried_nor_gone_back_to() -> None:
    with pytest.raises(VersionConflict):
        three().trying(3, 0.5)
    with pytest.raises(VersionConflict):
        three().back_to(3)
    with pytest.raises(VersionConflict):
        three().led_by(3, like=three().active)
    with pytest.raises(VersionConflict):
        three().without(3)
    with pytest.raises(VersionConflict):
        three().trying(2, 0.5).without(2)
    with pytest.raises(UnknownVersion, match=r"no version 9 of 'a'; versions: 3, 2, 1"):
        three().back_to(9)


def test_the_way_back_leads_past_what_is_dropped() -> None:
    assert three().without(2).way_back() == (3, 1)


def test_those_that_lead_back_are_kept_longest() -> None:
    undone = put(three().back_to(1), 4)
    assert states(undone.trimmed(2)) == {4: "active", 3: "kept", 1: "kept"}
    assert states(undone.trimmed(1)) == {4: "active", 1: "kept"}
    assert states(undone.trying(2, 0.5).trimmed(0)) == {4: "active", 2: "canary"}


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["put", "try new", "try", "back", "promote", "abort", "drop"]), st.integers(1, 9)
    ),
    max_size=20,
)


@given(CHANGES, st.integers(0, 3))
def test_whatever_is_done_one_is_active_and_the_way_back_ends(
    changes: list[tuple[str, int]], keep: int
) -> None:
    lineage, last = born(), 1
    for change, version in changes:
        try:
            match change:
                case "put":
                    last += 1
                    lineage = put(lineage, last)
                case "try new":
                    last += 1
                    lineage = lineage.joined_by(record(last)).trying(last, 0.5)
                case "try":
                    lineage = lineage.trying(version, 0.5)
                case "back":
                    lineage = lineage.back_to(version)
                case "promote":
                    lineage = lineage.promoted()
                case "abort":
                    lineage = lineage.aborted()
                case "drop":
                    lineage = lineage.without(version)
        except (VersionConflict, UnknownVersion):
            continue
        lineage = lineage.trimmed(keep)
        found = [each.state for each in lineage.records]
        assert found.count(AdapterState.ACTIVE) == 1
        assert found.count(AdapterState.CANARY) <= 1
        assert found.count(AdapterState.KEPT) <= keep
        versions = {each.version for each in lineage.records}
        assert len(versions) == len(lineage.records)
        assert all(each.before is None or each.before in versions for each in lineage.records)
        assert [each.share is not None for each in lineage.records] == [
            each.state is AdapterState.CANARY for each in lineage.records
        ]
        back = lineage.way_back()
        assert len(set(back)) == len(back)
        assert lineage.get(back[-1]).before is None, "no circle"
