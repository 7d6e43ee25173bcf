"""What native kernels' answers are held to beside those of transformers + peft."""

import math

import pytest

from manylora.loadtest.checks.bars.answers import hold_near
from manylora.loadtest.checks.bars.reference import NEAR, Said
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.manylora_client import Ask

ASKS = [Ask("base", (1, 2), 2), Ask("adapter", (3,), 2)]


def held(*distances: float) -> bool:
    report = Report("kinds")
    hold_near(report, "nf4: ", ASKS, distances)
    return report.passed


def test_each_answer_is_within_the_distance() -> None:
    assert held(0.01, NEAR)
    assert not held(0.01, 2 * NEAR), "another adapter's"
    assert not held(0.01, math.nan)


def test_a_distance_is_the_mean_over_the_same_tokens() -> None:
    said = Said((5, 6), (-1.0, -2.0))
    assert said.distance([-1.1, -1.9]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shorter"):
        said.distance([-1.0])
