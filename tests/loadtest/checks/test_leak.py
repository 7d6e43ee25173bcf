"""What counts as a leak, and some seconds of the load that looks for one."""

import random
from pathlib import Path

import pytest

from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.checks.leak import Bounds, Sample, gain, judge, leak

MIB = 1 << 20


def samples(per_minute: float = 0.0, *, start: float = 0.0, descriptors: float = 0.0) -> list[Sample]:
    """An hour, looked at every ten seconds, with noise of 2 MiB and a first third that grows by 300 MiB."""
    rng = random.Random(0)
    found = []
    for at in range(0, 3600, 10):
        warm = 300 * min(1.0, at / 1000)
        resident = 400 + warm + start + per_minute * at / 60 + rng.gauss(0, 2)
        found.append(Sample(at, int(resident * MIB), 40 + int(descriptors * at / 60), 12))
    return found


def judged(seen: list[Sample]) -> list[bool]:
    report = Report("leak")
    judge(report, seen, Bounds())
    return [check.passed for check in report.checks]


def test_a_line_is_laid_through_noise() -> None:
    assert gain([(0, 5), (10, 5), (20, 5)]) == 0
    assert gain([(0, 1), (10, 3), (20, 5)]) == pytest.approx(4)
    assert gain([(0, 1)]) == gain([]) == 0


def test_the_warm_up_is_not_judged_and_what_goes_on_growing_is() -> None:
    assert judged(samples()) == [True, True, True]
    assert judged(samples(0.3)) == [True, True, True]
    assert judged(samples(0.5)) == [False, True, True], "20 MiB in 40 minutes"
    assert judged(samples(descriptors=0.2)) == [True, False, True]
    assert judged([]) == [False, False, False]


async def test_the_small_form(tmp_path: Path) -> None:
    """In so short a time memory still settles: the bound is wide, the books are not."""
    report, seen = await leak(tmp_path, 5.0, 0.25, Bounds(mib=96, descriptors=30, threads=8))
    assert report.passed, report.checks
    assert len(seen) > 10
    assert all(sample.resident > 50 * MIB and sample.threads > 1 for sample in seen)
