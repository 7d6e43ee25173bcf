"""The engine's and the event loop's threads go before all others."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from manylora.server import threads
from manylora.server.threads import NICENESS, RESTS, SPELL, SWITCH_SECONDS, Rests, engine_first, step_back


@pytest.fixture(autouse=True)
def _interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_threads_for_work_beside_the_engine_step_back_and_no_others() -> None:
    async def look() -> tuple[int, int]:
        engine_first()
        return await asyncio.to_thread(niceness), niceness()

    before = niceness()
    beside, loop = asyncio.run(look())
    assert beside == min(19, NICENESS)
    assert loop == before


def test_a_thread_that_runs_python_gives_way_soon() -> None:
    async def arrange() -> None:
        engine_first()

    asyncio.run(arrange())
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)


def test_no_permission_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refused)
    step_back()


@dataclass
class Clock:
    """A thread's time, of which it works some and sleeps some."""

    worked: float = 0.0
    slept: float = 0.0

    def thread_time(self) -> float:
        return self.worked

    def monotonic(self) -> float:
        return self.worked + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(threads, "time", clock)
    return clock


def work(clock: Clock, spells: int, in_its_way: Callable[[], bool]) -> None:
    rests = Rests(in_its_way)
    for _ in range(4 * spells):
        clock.worked += SPELL / 4
        rests()


def test_a_thread_rests_in_proportion_to_its_work(clock: Clock) -> None:
    work(clock, 5, lambda: True)
    assert clock.slept == pytest.approx(RESTS * clock.worked)
    assert clock.worked == pytest.approx(5 * SPELL)


def test_a_thread_that_is_in_nobodys_way_works_on(clock: Clock) -> None:
    work(clock, 5, lambda: False)
    assert clock.slept == 0


def test_a_rest_ends_when_nobody_is_left_to_rest_for(clock: Clock) -> None:
    work(clock, 1, lambda: clock.slept == 0)
    assert 0 < clock.slept < RESTS * SPELL
