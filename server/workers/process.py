"""One worker process, from the side of whoever asks it: a question, an answer, and never a wait without an end."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from manylora.server.workers.child import ANSWER, MAGIC, MOST_BYTES, QUESTION

START_SECONDS = 60.0
"""A process that has not said that it is there after so long is given up: a second or two are usual."""
GRACE_SECONDS = 1.0
"""The process ends itself in time; so much later it is killed."""
_CHUNK = 1 << 16


class WorkerDied(Exception):
    """The process is gone, or what it says is no answer. It says nothing about the question."""


class WorkerTimedOut(WorkerDied):
    """The question took longer than it may; the process is gone."""


class WorkerProcess:
    """``python -m MODULE`` under way, whose main calls child.serve. Used by one thread; ``kill`` by any."""

    def __init__(self, module: str, arguments: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,  # ends with this process, and then so does the other
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            bufsize=0,
            # Ctrl-C is for the server, which drains first.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        for end in (self._in, self._out):
            os.set_blocking(end, False)
        self._greeted = False

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def greet(self) -> None:
        """Wait until the process can answer (blocking). Raises WorkerDied."""
        if not self._greeted:
            self._exchange(b"", time.monotonic() + START_SECONDS)
            self._greeted = True

    def ask(self, question: bytes, seconds: float) -> bytes:
        """Return the answer (blocking). Raises WorkerTimedOut or WorkerDied; the process is of no use then."""
        self.greet()
        if len(question) > MOST_BYTES:
            raise WorkerDied(f"a question of {len(question)} bytes is too long")
        frame = QUESTION.pack(MAGIC, seconds, len(question)) + question
        return self._exchange(frame, time.monotonic() + seconds + GRACE_SECONDS)

    def kill(self) -> None:
        """End the process at once; harmless when it has ended."""
        self._process.kill()

    def close(self) -> None:
        """End the process and give back what it holds here (blocking, but not for long)."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def _exchange(self, frame: bytes, deadline: float) -> bytes:
        """Write a frame and read one, whichever is possible, until the deadline."""
        left, read = memoryview(frame), bytearray()
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        if left:
            poll.register(self._in, select.POLLOUT)
        while (missing := _missing(read)) > 0:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise WorkerTimedOut("no answer in time")
            for end, _ in poll.poll(seconds * 1000 + 1):
                if end == self._in:
                    left = left[self._write(left) :]
                    if not left:
                        poll.unregister(self._in)
                else:
                    read += self._read(missing)
        return bytes(read[ANSWER.size :])

    def _write(self, left: memoryview) -> int:
        try:
            return os.write(self._in, left[:_CHUNK])
        except BlockingIOError:
            return 0
        except OSError:
            raise self._ended() from None

    def _read(self, most: int) -> bytes:
        try:
            found = os.read(self._out, min(most, MOST_BYTES))
        except BlockingIOError:
            return b""
        if not found:
            raise self._ended()
        return found

    def _ended(self) -> WorkerDied:
        try:
            status = self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerDied("the process closed its pipes")
        if status == -signal.SIGALRM:
            return WorkerTimedOut("no answer in time")
        return WorkerDied(f"the process ended with status {status}")


def _missing(read: bytearray) -> int:
    """Count the bytes that a frame lacks. Raises WorkerDied if it is none."""
    if len(read) < ANSWER.size:
        if not MAGIC.startswith(read[: len(MAGIC)]):
            raise WorkerDied("the process said something that is no answer")
        return ANSWER.size - len(read)
    magic, length = ANSWER.unpack_from(read)
    if magic != MAGIC or length > MOST_BYTES:
        raise WorkerDied("the process said something that is no answer")
    return ANSWER.size + int(length) - len(read)


def _environment() -> dict[str, str]:
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    return {**os.environ, **alone, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
