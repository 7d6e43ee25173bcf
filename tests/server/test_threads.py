"""The engine's and the event loop's threads go before all others."""

import asyncio
import os
import sys
import threading
from collections.abc import Iterator

import pytest

from manylora.server.threads import NICENESS, SWITCH_SECONDS, engine_first, step_back


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
