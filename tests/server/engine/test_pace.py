"""How many prompt tokens a step takes beside running streams."""

import pytest

from manylora.server.engine.pace import LEAST, MIXED, WAIT, Pace

MOST = 512


def paced(decodes: float, token: float) -> Pace:
    """Return one that has measured these seconds of a step of decodes and of a prompt token."""
    pace = Pace(MOST)
    pace.note(8, 0, decodes)
    pace.note(0, 100, 100 * token)
    return pace


def test_nothing_is_held_back_before_both_are_measured() -> None:
    pace = Pace(MOST)
    assert pace.beside_decodes(8, 8) == MOST
    pace.note(8, 0, 0.02)
    assert pace.beside_decodes(8, 8) == MOST


def test_a_step_with_prompts_takes_so_many_times_as_long_as_one_without() -> None:
    pace = paced(0.020, 0.0001)
    assert pace.beside_decodes(8, 8) == pytest.approx((WAIT - 1) * 200, abs=1)


def test_a_prompt_goes_on_however_slow_its_tokens_are() -> None:
    assert paced(0.020, 1.0).beside_decodes(8, 8) == LEAST


def test_fast_prompts_have_the_whole_step() -> None:
    assert paced(0.020, 1e-9).beside_decodes(8, 8) == MOST


def test_what_decodes_beside_them_took_is_not_counted_as_the_prompts() -> None:
    pace = paced(0.020, 0.0001)
    for _ in range(10):
        pace.note(8, 100, 0.030)
    assert pace.beside_decodes(8, 8) == pytest.approx((WAIT - 1) * 200, abs=1)


def test_a_few_tokens_say_nothing_about_what_one_costs() -> None:
    pace = paced(0.020, 0.0001)
    pace.note(8, 2, 0.5)
    assert pace.beside_decodes(8, 8) == pytest.approx((WAIT - 1) * 200, abs=1)


def test_a_row_of_mixed_steps_is_broken_to_measure_the_decodes_anew() -> None:
    """Otherwise more streams than were measured last would pass for slow prompts, for ever."""
    pace = paced(0.020, 0.0001)
    for _ in range(MIXED):
        assert pace.beside_decodes(64, 65) > 0
        pace.note(64, 50, 0.1)
    assert pace.beside_decodes(64, 65) == 0
    pace.note(64, 0, 0.08)
    assert pace.beside_decodes(64, 65) > 0


def test_a_slow_step_is_forgotten() -> None:
    pace = paced(0.020, 0.0001)
    pace.note(0, 100, 10.0)
    for _ in range(200):
        pace.note(0, 100, 0.01)
    assert pace.beside_decodes(8, 8) == pytest.approx((WAIT - 1) * 200, abs=2)


def test_while_few_run_and_many_come_in_a_step_may_take_what_one_of_all_will() -> None:
    pace = paced(0.020, 0.0001)
    for decodes, seconds in ((2, 0.010), (32, 0.080)):
        for _ in range(100):
            pace.note(decodes, 0, seconds)
    assert pace.beside_decodes(2, 2) == pytest.approx((WAIT - 1) * 100, abs=2)
    assert pace.beside_decodes(32, 33) == MOST
    pace = paced(0.020, 0.001)
    for decodes, seconds in ((2, 0.010), (32, 0.080)):
        for _ in range(100):
            pace.note(decodes, 0, seconds)
    assert pace.beside_decodes(32, 33) == pytest.approx((WAIT - 1) * 80, abs=2)
    assert pace.beside_decodes(2, 32) == pytest.approx(WAIT * 80 - 10, abs=2)


def test_a_number_of_decodes_that_was_never_measured_takes_what_others_took() -> None:
    pace = paced(0.020, 0.001)
    assert pace.beside_decodes(1, 2) == pytest.approx((WAIT - 1) * 20, abs=1)
