"""Which of the server's threads go first: the engine's and the event loop's, and all others after them."""

import asyncio
import contextlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

NICENESS = 10
SWITCH_SECONDS = 5e-5
"""After so long a thread that runs Python lets another have the interpreter that waits for it. A step of the engine
asks for it some hundred times, after each operation of torch: with Python's own 5 ms one busy thread would make it a
second long."""
THREADS = 4
"""For what the event loop has done elsewhere: few, since each one that is busy takes its share of the interpreter."""


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
