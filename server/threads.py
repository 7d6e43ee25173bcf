"""Which of the server's threads go first: the engine's and the event loop's, and all others after them."""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

NICENESS = 10
SWITCH_SECONDS = 5e-5
"""After so long a thread that runs Python lets another have the interpreter that waits for it. A step of the engine
asks for it some hundred times, after each operation of torch: with Python's own 5 ms one busy thread would make it a
second long."""
THREADS = 4
"""For what the event loop has done elsewhere: few, since each one that is busy takes its share of the interpreter."""
LONGEST_REST = 0.01
"""Seconds after which a thread that rests looks whether anybody is in its way still."""
SPELL = 0.002
"""Processor seconds for which a thread works before it rests."""
RESTS = 11
"""Times as long as it has worked it rests then: a twelfth of a core is what streams lose by it."""


def step_back() -> None:
    """Let other threads have the processor before this one, where the system can tell threads apart (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def engine_first() -> None:
    """Arrange that the engine's steps are hardly held up by what else runs here; call on the event loop."""
    sys.setswitchinterval(SWITCH_SECONDS)
    executor = ThreadPoolExecutor(THREADS, thread_name_prefix="worker", initializer=step_back)
    asyncio.get_running_loop().set_default_executor(executor)


class Rests:
    """Has a thread rest between pieces of long work that nobody waits for, as long as somebody is ``in_its_way``.

    Priority alone doesn't: a thread that stepped back gets a tenth of each core that is busy, and kernels whose threads
    wait for each other lose that on both. For one thread, in which it is made and called.
    """

    def __init__(self, in_its_way: Callable[[], bool]) -> None:
        self._in_its_way = in_its_way
        self._began = time.thread_time()

    def __call__(self) -> None:
        """Rest if it is time."""
        spell = time.thread_time() - self._began
        if spell < SPELL:
            return
        ends = time.monotonic() + RESTS * spell
        while self._in_its_way() and (left := ends - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_REST))
        self._began = time.thread_time()
