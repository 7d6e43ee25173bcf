"""Lengths of requests: in their ranges, and as the papers draw them."""

from statistics import median

import pytest

from manylora.loadtest.bench.lengths import LengthsError, Punica, Range, Uniform


def test_a_range_ends_before_its_high() -> None:
    drawn = Uniform(Range.parse("8:512"), Range.parse("3:5")).draw(20_000, 0)
    assert (min(a for a, _ in drawn), max(a for a, _ in drawn)) == (8, 511)
    assert {b for _, b in drawn} == {3, 4}
    assert sum(a for a, _ in drawn) / 20_000 == pytest.approx(259.5, rel=0.01)
    assert Uniform(Range.parse("64"), Range.parse("64")).draw(2, 0) == [(64, 64)] * 2


def test_punica_s_prompts_are_log_normal_and_totals_uniform() -> None:
    drawn = Punica(2048).draw(20_000, 0)
    # The median of -1 + 18·exp(0.8·z) is 17; the mean of totals uniform below 2,048 is 1,023.5.
    assert median(prompt for prompt, _ in drawn) in (16, 17)
    assert sum(a + b for a, b in drawn) / 20_000 == pytest.approx(1023.5, rel=0.02)
    assert all(prompt >= 1 and answer >= 2 and prompt + answer <= 2048 for prompt, answer in drawn)
    assert drawn == Punica(2048).draw(20_000, 0) != Punica(2048).draw(20_000, 1)


@pytest.mark.parametrize("text", ["", "x", "0", "5:4", "8:", "1:2:3", "-1:4"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(LengthsError):
        Range.parse(text)
