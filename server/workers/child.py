"""A worker's own side: questions from standard input, answers to standard output, each within its time and memory.

A frame is MAGIC, a length and the bytes; a question's frame has the seconds that its answer may take before them. What
ends the process when those are over is the kernel's timer: it holds whatever is being computed, and whether or not
anybody is left who would end it.
"""

import contextlib
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

MAGIC = b"mlw1"
QUESTION, ANSWER = struct.Struct("<4sdI"), struct.Struct("<4sI")
MOST_BYTES = 1 << 28
"""Of one question or answer."""
NICENESS = 10
"""The engine goes first. At 19 a template on a busy machine would hardly move."""


def serve(answer: Callable[[bytes], bytes], memory_bytes: int) -> None:
    """Answer questions until there are no more; ``memory_bytes`` may be taken beyond what the process has now."""
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    questions = sys.stdin.buffer
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    _limit_memory(memory_bytes)
    _write(answers, b"")
    while len(head := questions.read(QUESTION.size)) == QUESTION.size:
        _, seconds, length = QUESTION.unpack(head)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        result = answer(questions.read(length))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, result)


def _write(answers: BinaryIO, result: bytes) -> None:
    answers.write(ANSWER.pack(MAGIC, len(result)))
    answers.write(result)
    answers.flush()


def _limit_memory(nbytes: int) -> None:
    """Limit the address space, where the system can: allocations beyond fail, and nobody else is asked to make room."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + nbytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        return
