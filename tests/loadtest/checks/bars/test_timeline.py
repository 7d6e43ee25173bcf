"""What could answer a request is what its name had between the asking and the answer, changes under way included."""

import time

from manylora.loadtest.checks.bars.timeline import ABSENT, Timeline


def test_a_name_begins_absent() -> None:
    assert Timeline().possible(0, time.monotonic()) == {ABSENT}


def test_both_sides_of_a_change_under_way_are_possible() -> None:
    line = Timeline()
    with line.change("one"):
        during = time.monotonic()
        assert line.possible(during, during) == {ABSENT, "one"}
    after = time.monotonic()
    assert line.possible(after, after) == {"one"}


def test_a_long_request_may_meet_any_version_of_its_time() -> None:
    line = Timeline()
    began = time.monotonic()
    for version in ("one", "two", ABSENT):
        with line.change(version):
            pass
    assert line.possible(began, time.monotonic()) == {ABSENT, "one", "two"}
    now = time.monotonic()
    assert line.possible(now, now) == {ABSENT}
    assert line.version is ABSENT
