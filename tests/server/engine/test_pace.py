"""How many prompt tokens a step takes beside running streams."""

import pytest

from manylora.server.engine.pace import CROWD, LEAST, MIXED, WAIT, Pace
from manylora.server.engine.prompt_cost import MANY


def paced(decodes: float, token: float) -> Pace:
    """Return one that has measured these seconds of a step of decodes and of a prompt token."""
    pace = Pace()
    pace.note(8, (), decodes)
    pace.note(0, [(0, 100)], 100 * token)
    return pace


def beside(pace: Pace, decodes: int, streams: int) -> int:
    """Return how long the chunk is that begins a prompt beside so many decodes."""
    return pace.beside_decodes(decodes, streams).tokens(0)


def test_nothing_is_held_back_before_both_are_measured() -> None:
    pace = Pace()
    assert beside(pace, 8, 8) == MANY
    pace.note(8, (), 0.02)
    assert beside(pace, 8, 8) == MANY


def test_a_step_with_prompts_takes_so_many_times_as_long_as_one_without() -> None:
    pace = paced(0.020, 0.0001)
    assert beside(pace, 8, 8) == pytest.approx((WAIT - 1) * 200, abs=1)


def test_a_prompt_goes_on_however_slow_its_tokens_are() -> None:
    assert beside(paced(0.020, 1.0), 8, 8) == LEAST


def test_fast_prompts_have_the_whole_step() -> None:
    assert beside(paced(0.020, 1e-9), 8, 8) > 10_000


def test_what_decodes_beside_them_took_is_not_counted_as_the_prompts() -> None:
    pace = paced(0.020, 0.0001)
    for _ in range(10):
        pace.note(8, [(0, 100)], 0.030)
    assert beside(pace, 8, 8) == pytest.approx((WAIT - 1) * 200, abs=1)


def test_a_few_tokens_say_nothing_about_what_one_costs() -> None:
    pace = paced(0.020, 0.0001)
    pace.note(8, [(0, 2)], 0.5)
    assert beside(pace, 8, 8) == pytest.approx((WAIT - 1) * 200, abs=1)


def test_a_row_of_mixed_steps_is_broken_to_measure_the_decodes_anew() -> None:
    """Otherwise more streams than were measured last would pass for slow prompts, for ever."""
    pace = paced(0.020, 0.0001)
    for _ in range(MIXED):
        assert beside(pace, 64, 65) > 0
        pace.note(64, [(0, 50)], 0.1)
    assert beside(pace, 64, 65) == 0
    pace.note(64, (), 0.08)
    assert beside(pace, 64, 65) > 0


def test_a_slow_step_is_forgotten() -> None:
    pace = paced(0.020, 0.0001)
    pace.note(0, [(0, 100)], 10.0)
    for _ in range(200):
        pace.note(0, [(0, 100)], 0.01)
    assert beside(pace, 8, 8) == pytest.approx((WAIT - 1) * 200, abs=2)


def test_while_few_run_and_many_come_in_a_step_may_take_what_one_of_all_will() -> None:
    pace = paced(0.020, 0.0001)
    for decodes, seconds in ((2, 0.010), (32, 0.080)):
        for _ in range(100):
            pace.note(decodes, (), seconds)
    assert beside(pace, 2, 2) == pytest.approx((WAIT - 1) * 100, abs=2)
    assert beside(pace, 32, 33) > 500
    pace = paced(0.020, 0.001)
    for decodes, seconds in ((2, 0.010), (32, 0.080)):
        for _ in range(100):
            pace.note(decodes, (), seconds)
    assert beside(pace, 32, 33) == pytest.approx((WAIT - 1) * 80, abs=2)
    assert beside(pace, 16, 32) == pytest.approx(WAIT * CROWD * 20 - 20, abs=2)
    assert beside(pace, 2, 32) == pytest.approx(WAIT * CROWD * 10 - 10, abs=2), "but no stream waits for ever"


def test_a_number_of_decodes_that_was_never_measured_takes_what_others_took() -> None:
    pace = paced(0.020, 0.001)
    assert beside(pace, 1, 2) == pytest.approx((WAIT - 1) * 20, abs=1)


DECODES = 0.033


def seconds_of(start: int, length: int) -> float:
    """Return what a chunk takes: what Qwen2.5-0.5B's shape in NF4 was measured with on two cores."""
    return length * (0.0012 + 0.0000006 * (start + length / 2))


def taught(*chunks: tuple[int, int]) -> Pace:
    """Return one that has seen steps of eight decodes and these chunks."""
    pace = Pace()
    pace.note(8, (), DECODES)
    for chunk in chunks:
        pace.note(0, [chunk], seconds_of(*chunk))
    return pace


@pytest.mark.parametrize("known", [((0, 64),), ((0, 64), (0, 512), (512, 200)), ((0, 300), (3000, 300))])
def test_a_chunk_is_shorter_the_more_comes_before_it(known: tuple[tuple[int, int], ...]) -> None:
    """A token takes three times as long behind 4,000 others; an average lags behind what it takes now."""
    pace, done, steps = taught(*known), 0, []
    while done < 4096:
        allowance = pace.beside_decodes(8, 9)
        length = 0 if allowance.spent else min(512, 4096 - done, allowance.tokens(done))
        chunks = [(done, length)] if length else []
        steps.append(DECODES + sum(seconds_of(*chunk) for chunk in chunks))
        pace.note(8, chunks, steps[-1])
        done += length
    assert max(steps) < 2 * DECODES
    assert len(steps) < 500, "and what is there to be had is taken"


def test_a_prompt_that_is_mostly_in_the_cache_begins_with_what_it_costs_behind_that() -> None:
    """Though nothing was ever measured there."""
    allowance = taught((0, 64), (0, 200)).beside_decodes(8, 9)
    length = allowance.tokens(3500)
    assert length >= 1
    assert DECODES + seconds_of(3500, length) < 2 * DECODES


def test_what_long_prompts_take_is_no_matter_of_short_ones() -> None:
    pace = taught((0, 64), (2000, 300), (4000, 300))
    assert seconds_of(0, beside(pace, 8, 9)) == pytest.approx((WAIT - 1) * DECODES, rel=0.1)
    for _ in range(100):
        pace.note(0, [(0, 64)], seconds_of(0, 64))
    length = pace.beside_decodes(8, 9).tokens(4000)
    assert seconds_of(4000, length) == pytest.approx((WAIT - 1) * DECODES, rel=0.2), "and is remembered"


def test_a_steps_prompts_share_what_it_has() -> None:
    pace = taught((0, 64), (1000, 300))
    allowance = pace.beside_decodes(8, 10)
    half = allowance.tokens(0) // 2
    allowance.take(0, half)
    assert allowance.tokens(0) == pytest.approx(half, abs=2)
    assert allowance.tokens(1000) < half
    allowance.take(0, half)
    assert allowance.spent
    allowance.give_back(0, half)
    assert not allowance.spent


def test_many_steps_of_few_tokens_say_together_what_these_cost() -> None:
    pace = paced(0.020, 1.0)
    for _ in range(400):
        allowance = pace.beside_decodes(8, 9)
        length = 0 if allowance.spent else min(100, allowance.tokens(0))
        pace.note(8, [(0, length)] if length else [], 0.020 + 0.0001 * length)
    assert beside(pace, 8, 9) > 50


@pytest.mark.parametrize("behind", [1000, 3000, 4000])
def test_where_only_what_comes_before_seems_to_cost_a_prompt_is_bounded_too(behind: int) -> None:
    """A line that would begin below nothing begins there: its first token costs nothing, the others do."""
    pace = Pace()
    pace.note(8, (), DECODES)
    pace.note(0, [(0, 64)], 0.0001)
    pace.note(0, [(behind, 300)], 0.9)
    each = 0.9 / 300 / (behind + 150)
    length = beside(pace, 8, 9)
    assert LEAST < length < MANY
    assert length * length / 2 * each == pytest.approx((WAIT - 1) * DECODES, rel=0.25)
    assert length >= pace.beside_decodes(8, 9).tokens(behind)


OF_STEP, RECORDED, ISSUED = 0.060, 0.006, 0.00005


def on_a_gpu(length: int) -> float:
    """Return what a step with a prompt takes where it is told op by op; one of decodes alone is a recording."""
    return RECORDED + OF_STEP + ISSUED * length


def test_where_a_step_with_a_prompt_takes_long_by_itself_prompts_come_in_few_steps() -> None:
    """By what tokens took in short steps each would seem to cost the whole step, and four would be all that fits."""
    pace = Pace()
    pace.note(8, (), RECORDED)
    pace.note(8, [(0, 512)], on_a_gpu(512))
    left, steps = 32 * 64, 0
    while left:
        allowance = pace.beside_decodes(8, 40)
        length = 0 if allowance.spent else min(left, allowance.tokens(0))
        pace.note(8, [(0, length)] if length else [], on_a_gpu(length) if length else RECORDED)
        left, steps = left - length, steps + 1
    assert steps < 10, "and not the five hundred of four tokens each"
    assert on_a_gpu(beside(pace, 8, 9)) < 3 * OF_STEP, "and are not waited for without end"


def test_what_a_step_takes_by_itself_is_kept_while_all_steps_are_alike() -> None:
    pace = Pace()
    pace.note(8, (), RECORDED)
    for length in (512, 8, *[200] * 300):
        pace.note(8, [(0, length)], on_a_gpu(length))
        pace.note(8, (), RECORDED)
    assert on_a_gpu(beside(pace, 8, 9)) == pytest.approx(RECORDED + 2 * OF_STEP, rel=0.35)


def test_where_a_step_costs_nothing_by_itself_lengths_that_differ_say_so() -> None:
    pace = Pace()
    pace.note(8, (), DECODES)
    for length in (512, 4, 60, 20, 33, 250) * 4:
        pace.note(8, [(0, length)], DECODES + seconds_of(0, length))
        pace.note(8, (), DECODES)
    assert seconds_of(0, beside(pace, 8, 9)) == pytest.approx((WAIT - 1) * DECODES, rel=0.1)
