"""Several weighted adapters in a request: all are on the device at once or it waits, and each is safe from others."""

import pytest

from manylora.adapters.types import FreedAdapter
from manylora.server.engine.request import FinishReason
from manylora.server.errors import AdapterUnavailable, InvalidRequest, ModelNotFound, StepFailed
from tests.server.engine.fakes import Harness, Pools, ask, expected, mark_of, weights

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
ONE_TWO = ((1, 0.7), (2, -0.3))
TWO_THREE = ((2, 1.5), (3, 0.25))


def knowing(count: int, pools: Pools | None = None, *, cold: bool = False) -> Harness:
    harness = Harness(pools or Pools())
    for adapter_id in range(1, count + 1):
        harness.know(adapter_id, cold=cold)
    return harness


# Room


def test_a_mixture_waits_until_all_its_parts_have_rows_and_keeps_them() -> None:
    harness = knowing(4, Pools(rows=12))
    for adapter_id in (1, 4):
        harness.engine.add_request(ask(f"busy{adapter_id}", PROMPT, 6 * adapter_id, ((adapter_id, 1.0),)))
    harness.step()
    # One part has rows, the other can have the last four: but three are asked for.
    mixture = ((1, 0.7), (2, -0.3), (3, 2.0))
    harness.engine.add_request(ask("waits", PROMPT, 9, mixture))
    harness.engine.add_request(ask("base", PROMPT, 3))
    for _ in range(4):
        harness.step()
    assert not harness.tokens("waits")
    assert harness.engine.cache.tier(2) == harness.engine.cache.tier(3) == "host", "half a mixture took rows"
    assert harness.tokens("base") == expected(PROMPT, 3)
    while not harness.tokens("waits"):
        harness.step()
        harness.engine.add_request(
            ask(f"later{harness.engine.scheduler.waiting.num_lines}", PROMPT, 1, ((4, 1.0),))
        )
    assert {harness.engine.cache.tier(i) for i in (1, 2, 3)} == {"device"}
    harness.run()
    assert harness.tokens("waits") == expected(PROMPT, 9, mixture)


def test_mixtures_that_share_a_part_run_at_once_in_the_rows_of_three() -> None:
    harness = knowing(3, Pools(rows=12))
    asked = {"left": ONE_TWO, "right": TWO_THREE, "part": ((2, 1.0),)}
    for name, adapters in asked.items():
        harness.engine.add_request(ask(name, PROMPT, 5, adapters))
    harness.step()
    assert {o.request_id for o in harness.outputs} == set(asked), "a part that two share was counted twice"
    harness.run()
    for name, adapters in asked.items():
        assert harness.tokens(name) == expected(PROMPT, 5, adapters)


def test_a_pinned_part_is_counted_once_and_stays() -> None:
    harness = Harness(Pools(rows=8))
    harness.know(1, pinned=True)
    for adapter_id in (2, 3):
        harness.know(adapter_id)
    harness.preload(1)
    for number, other in enumerate((2, 3, 2)):
        mixture = ((1, 0.5), (other, -1.0))
        harness.engine.add_request(ask(f"r{number}", PROMPT, 4, mixture))
        harness.run()
        assert harness.tokens(f"r{number}") == expected(PROMPT, 4, mixture)
        assert harness.engine.cache.tier(1) == "device"


def test_one_that_can_never_fit_is_refused_with_the_numbers_and_one_that_just_fits_is_served() -> None:
    harness = knowing(4, Pools(rows=12))
    fits = ((1, 0.5), (2, 0.5), (3, 0.5))
    too_wide = ask("wide", PROMPT, 3, (*fits, (4, 0.5)))
    with pytest.raises(
        InvalidRequest, match=r"4 adapters .* 16 rank rows of ._proj, the arena has 12.*arena-rows"
    ):
        harness.engine.check(too_wide)
    harness.engine.add_request(too_wide)
    harness.engine.add_request(ask("fits", PROMPT, 3, fits))
    harness.run()
    assert isinstance(harness.error("wide"), InvalidRequest)
    assert harness.tokens("fits") == expected(PROMPT, 3, fits)


def test_parts_that_find_gaps_of_their_own_move_nobody() -> None:
    """The gaps are four rows each: eight in one piece would take moves."""
    harness = knowing(7, Pools(rows=20))
    for adapter_id in range(1, 6):
        count = 30 if adapter_id in (2, 4) else 1
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, count, ((adapter_id, 1.0),)))
    harness.step()
    for adapter_id in (1, 3, 5):
        harness.engine.remove_adapter(adapter_id, lambda freed: None, abort=False)
    mixture = ((6, 0.7), (7, -0.3))
    harness.engine.add_request(ask("mixture", PROMPT, 3, mixture))
    harness.step()
    assert harness.arena.moves == 0
    assert harness.tokens("mixture"), "it waited for moves that it doesn't need"
    harness.run()
    assert harness.tokens("mixture") == expected(PROMPT, 3, mixture)


def test_a_mixture_that_waits_too_long_gets_a_503_that_says_for_how_many() -> None:
    harness = Harness(Pools(rows=8, adapter_timeout=0.0))
    harness.know(1, pinned=True)
    for adapter_id in (2, 3):
        harness.know(adapter_id)
    harness.engine.add_request(ask("busy", PROMPT, 20, ((1, 1.0),)))
    harness.step()
    harness.engine.add_request(ask("waits", PROMPT, 3, TWO_THREE))
    harness.run()
    error = harness.error("waits")
    assert isinstance(error, AdapterUnavailable)
    assert "no room for the 2 adapters of 'label-waits'" in str(error)


def test_preempted_mixtures_say_the_same() -> None:
    harness = knowing(3, Pools(blocks=12))
    asked = {"a": ONE_TWO, "b": TWO_THREE, "c": ((1, 1.0),), "d": ((1, 0.25), (2, 0.25), (3, 3.0))}
    for name, adapters in asked.items():
        harness.engine.add_request(ask(name, PROMPT[:5], 20, adapters))
    harness.run()
    assert harness.engine.preemptions > 0
    for name, adapters in asked.items():
        assert harness.tokens(name) == expected(PROMPT[:5], 20, adapters)


# From disk


def test_cold_parts_are_each_read_once() -> None:
    harness = knowing(3, cold=True)
    asked = {"left": ONE_TWO, "right": TWO_THREE, "one": ((1, 1.0),)}
    for name, adapters in asked.items():
        harness.engine.add_request(ask(name, PROMPT, 4, adapters))
    harness.run()
    assert harness.reads == {1: 1, 2: 1, 3: 1}
    for name, adapters in asked.items():
        assert harness.tokens(name) == expected(PROMPT, 4, adapters)


def test_a_part_that_can_not_be_read_fails_the_mixture_and_no_other_part() -> None:
    harness = knowing(2, cold=True)
    harness.engine.add_request(ask("mixture", PROMPT, 3, ONE_TWO))
    harness.engine.add_request(ask("part", PROMPT, 3, ((1, 1.0),)))
    harness.step()
    broken = harness.loads.pop(next(i for i, held in enumerate(harness.loads) if held.adapter_id == 2))
    harness.engine.host_loaded(broken.adapter_id, AdapterUnavailable("adapter 'two' can't be served: disk"))
    harness.run()
    assert "'two'" in str(harness.error("mixture"))
    assert harness.tokens("part") == expected(PROMPT, 3, ((1, 1.0),))


def test_parts_evicted_while_another_is_read_come_back() -> None:
    """Two rooms, host copies of one: what the mixture needs goes while it waits, and it runs nevertheless."""
    harness = Harness(Pools(rows=8, host_bytes=weights(1).nbytes))
    for adapter_id in (1, 2, 3, 4):
        harness.know(adapter_id, cold=True)
    harness.engine.add_request(ask("first", PROMPT, 1, ((1, 1.0),)))
    harness.run()
    harness.engine.add_request(ask("mixture", PROMPT, 4, ONE_TWO))
    harness.step()
    slow = harness.loads.pop()
    assert slow.adapter_id == 2
    for adapter_id in (3, 4):
        harness.engine.add_request(ask(f"r{adapter_id}", PROMPT, 2, ((adapter_id, 1.0),)))
    while not (harness.tokens("r3") and harness.tokens("r4")):
        harness.step()
        harness.finish_loads()
    assert harness.engine.cache.tier(1) != "device", "nothing was evicted: this test proves nothing"
    harness.engine.host_loaded(2, slow.load_from())
    harness.run()
    assert harness.tokens("mixture") == expected(PROMPT, 4, ONE_TWO)


# Deleting a part


@pytest.mark.parametrize("part", [1, 2])
def test_a_mixture_finishes_on_a_part_that_is_deleted_and_then_all_is_given_back(part: int) -> None:
    harness = knowing(3)
    told: list[FreedAdapter] = []
    harness.engine.add_request(ask("runs", PROMPT, 8, ONE_TWO, n=3))
    harness.engine.add_request(ask("other", PROMPT, 8, ((3, 1.0),)))
    harness.step()
    harness.engine.remove_adapter(part, told.append, abort=False)
    harness.engine.add_request(ask("late", PROMPT, 8, ONE_TWO))
    harness.step()
    assert not told
    harness.run()
    assert told == [FreedAdapter(rows=8, device_bytes=128, host_bytes=weights(part).nbytes, aborted=0)]
    for index in range(3):
        assert harness.tokens("runs", index) == expected(PROMPT, 8, ONE_TWO)
    assert isinstance(harness.error("late"), ModelNotFound)
    assert harness.tokens("other") == expected(PROMPT, 8, ((3, 1.0),))
    other = 3 - part
    harness.engine.add_request(ask("alone", PROMPT, 3, ((other, 1.0),)))
    harness.run()
    assert harness.tokens("alone") == expected(PROMPT, 3, ((other, 1.0),))


def test_deleting_a_part_with_abort_ends_its_mixtures_and_no_others() -> None:
    harness = knowing(3)
    told: list[FreedAdapter] = []
    asked = {"mine": ONE_TWO, "also": ((1, 1.0),), "others": TWO_THREE}
    for name, adapters in asked.items():
        harness.engine.add_request(ask(name, PROMPT, 6, adapters, n=2))
    for _ in range(2):
        harness.step()
    harness.engine.remove_adapter(1, told.append, abort=True)
    assert told[0].aborted == 4
    harness.run()
    assert harness.reason("mine", 1) is harness.reason("also") is FinishReason.ABORTED
    assert harness.tokens("others") == expected(PROMPT, 6, TWO_THREE)


def test_two_parts_deleted_under_one_mixture_tell_both_and_leave_nothing() -> None:
    harness = knowing(2)
    told: list[FreedAdapter] = []
    harness.engine.add_request(ask("runs", PROMPT, 6, ONE_TWO))
    harness.step()
    for adapter_id in (2, 1):
        harness.engine.remove_adapter(adapter_id, told.append, abort=False)
    harness.run()
    assert harness.tokens("runs") == expected(PROMPT, 6, ONE_TWO)
    assert len(told) == 2
    assert len(harness.engine.cache) == harness.engine.blocks.num_cached == 0
    assert harness.engine.cache.host_bytes == 0


# Prefixes


def test_prefixes_are_shared_by_equal_parts_and_weights_alone() -> None:
    harness = knowing(2)
    kinds = [
        ONE_TWO,
        ((1, 0.7), (2, -0.25)),
        ((1, -0.3), (2, 0.7)),
        ((1, 0.7),),
        ((2, -0.3),),
        ((1, 1.0),),
        (),
    ]
    for number, adapters in enumerate(kinds):
        harness.engine.add_request(ask(f"r{number}", PROMPT, 3, adapters))
        harness.run()
        assert harness.engine.blocks.hit_tokens == 0, f"{adapters} met the prefix of another"
    for number, adapters in enumerate(kinds):
        before = harness.engine.blocks.hit_tokens
        harness.engine.add_request(ask(f"again{number}", PROMPT, 3, adapters))
        harness.run()
        assert harness.engine.blocks.hit_tokens - before == 8, f"{adapters} didn't meet its own"
        assert harness.tokens(f"again{number}") == expected(PROMPT, 3, adapters)


def test_parts_in_another_order_are_served_and_share_nothing() -> None:
    """The engine takes a tuple as it is: putting it in one form is the business of whoever makes it."""
    harness = knowing(2)
    for number, adapters in enumerate((ONE_TWO, ONE_TWO[::-1])):
        harness.engine.add_request(ask(f"r{number}", PROMPT, 3, adapters))
        harness.run()
        assert harness.tokens(f"r{number}") == expected(PROMPT, 3, ONE_TWO)
    assert harness.engine.blocks.hit_tokens == 0


# Isolation and faults


def test_a_mixture_that_overflows_fails_alone_though_its_parts_are_in_use() -> None:
    harness = knowing(3)
    harness.model.overflows = lambda token, mark: mark == mark_of(ONE_TWO)
    asked = {"bad": ONE_TWO, "part": ((1, 1.0),), "shares": TWO_THREE, "base": ()}
    for _ in range(2):
        for name, adapters in asked.items():
            harness.engine.add_request(ask(name, PROMPT, 6, adapters))
        harness.run()
        assert isinstance(harness.error("bad"), StepFailed)
        for name in ("part", "shares", "base"):
            assert harness.tokens(name) == expected(PROMPT, 6, asked[name])
        harness.outputs.clear()
    harness.model.overflows = lambda token, mark: False
    harness.engine.add_request(ask("sound", PROMPT, 6, ONE_TWO))
    harness.run()
    assert harness.tokens("sound") == expected(PROMPT, 6, ONE_TWO), "a prefix that overflowed was kept"


def test_a_fault_while_one_part_is_written_fails_the_mixture_and_the_next_one_is_whole() -> None:
    harness = knowing(3)
    harness.engine.add_request(ask("good", PROMPT, 6, ((3, 1.0),)))
    harness.step()
    harness.arena.fault = RuntimeError("boom")
    harness.engine.add_request(ask("bad", PROMPT, 6, ONE_TWO))
    harness.run()
    assert isinstance(harness.error("bad"), StepFailed)
    assert harness.tokens("good") == expected(PROMPT, 6, ((3, 1.0),))
    harness.engine.add_request(ask("again", PROMPT, 6, ONE_TWO))
    harness.run()
    assert harness.tokens("again") == expected(PROMPT, 6, ONE_TWO)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf"), 3.5e38])
def test_weights_that_no_float32_holds_are_refused(weight: float) -> None:
    harness = knowing(2)
    with pytest.raises(InvalidRequest, match="finite number of 32 bits"):
        harness.engine.check(ask("r", PROMPT, 3, ((1, 1.0), (2, weight))))
    harness.engine.check(ask("r", PROMPT, 3, ((1, 1.0), (2, 3.4e38))))
