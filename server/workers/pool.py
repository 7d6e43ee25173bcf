"""A few workers and the questions that wait for them, fair by key: who asks much waits for himself."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from manylora.server.workers.process import WorkerDied, WorkerProcess

MOST_WAITING = 1024
"""Questions of one key that may wait."""
PATIENCE_SECONDS = 30.0
"""For which a question waits for a worker."""
Start: TypeAlias = Callable[[], WorkerProcess]


class WorkersBusy(Exception):
    """Too many questions of this key wait, or this one has waited too long: try again later."""


@dataclass(slots=True)
class _Job:
    question: bytes
    answer: "Future[bytes]"
    asked: float = field(default_factory=time.monotonic)


class WorkerPool:
    """Asks up to ``size`` workers, which are started when they are needed. Methods may be called from any thread.

    Of a key one question is computed at a time, and keys take turns: what one asks for can't keep all workers.
    """

    def __init__(self, start: Start, *, size: int, seconds: float) -> None:
        """``seconds`` is how long an answer may take."""
        self._start = start
        self._size = size
        self._seconds = seconds
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._asked: set[str] = set()
        self._changed = threading.Condition()
        self._threads = 0
        self._idle = 0
        self._workers: set[WorkerProcess] = set()
        self._closed = False
        self._resting = False

    def submit(self, question: bytes, key: str) -> "Future[bytes]":
        """Return what will hold the answer, or WorkerTimedOut, WorkerDied or WorkersBusy.

        A worker that dies of something else than its time is replaced, and its question asked once more.
        """
        job = _Job(question, Future())
        with self._changed:
            waiting = len(self._waiting.get(key, ()))
            if self._closed:
                job.answer.set_exception(WorkerDied("the workers have been ended"))
            elif waiting >= MOST_WAITING:
                job.answer.set_exception(WorkersBusy(f"{waiting} questions wait already"))
            else:
                self._resting = False
                self._waiting.setdefault(key, deque()).append(job)
                ready = sum(each not in self._asked for each in self._waiting)
                if ready > self._idle and self._threads < self._size:
                    self._threads += 1
                    threading.Thread(target=self._run, name="worker", daemon=True).start()
                self._changed.notify()
        return job.answer

    @property
    def waiting(self) -> int:
        """Questions that no worker has begun with, and that somebody still waits for."""
        with self._changed:
            return sum(not job.answer.cancelled() for jobs in self._waiting.values() for job in jobs)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers there are."""
        with self._changed:
            return tuple(worker.pid for worker in self._workers)

    def rest(self) -> None:
        """End the workers as soon as nothing waits for them; the next question starts them again."""
        with self._changed:
            self._resting = True
            self._changed.notify_all()

    def close(self) -> None:
        """End all workers at once; what they compute, and what waits, fails with WorkerDied."""
        with self._changed:
            self._closed = True
            jobs = [job for waiting in self._waiting.values() for job in waiting]
            self._waiting.clear()
            for worker in self._workers:
                worker.kill()
            self._changed.notify_all()
        for job in jobs:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(WorkerDied("the workers have been ended"))

    def _run(self) -> None:
        worker: WorkerProcess | None = None
        while (found := self._next()) is not None:
            key, job = found
            try:
                worker = self._settle(job, worker)
            finally:
                with self._changed:
                    self._asked.discard(key)
                    self._changed.notify()
        if worker is not None:
            self._end(worker)

    def _next(self) -> tuple[str, _Job] | None:
        """Wait for a question whose key has its turn; None: there will be none."""
        with self._changed:
            while not self._closed:
                for key, jobs in self._waiting.items():
                    if key not in self._asked:
                        job = jobs.popleft()
                        if jobs:
                            self._waiting.move_to_end(key)
                        else:
                            del self._waiting[key]
                        self._asked.add(key)
                        return key, job
                if self._resting and not self._waiting:
                    break
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            self._threads -= 1
            return None

    def _settle(self, job: _Job, worker: WorkerProcess | None) -> WorkerProcess | None:
        """Answer a question; return the worker that can be asked next."""
        if not job.answer.set_running_or_notify_cancel():
            return worker  # whoever asked has gone
        if time.monotonic() - job.asked > PATIENCE_SECONDS:
            job.answer.set_exception(WorkersBusy(f"no worker had time for {PATIENCE_SECONDS:g} s"))
            return worker
        for attempt in range(2):
            try:
                worker = worker or self._begin()
                job.answer.set_result(worker.ask(job.question, self._seconds))
                return worker
            except Exception as error:
                if worker is not None:
                    self._end(worker)
                    worker = None
                if attempt or self._closed or not _is_nobody_s_fault(error):
                    job.answer.set_exception(error)
                    return None
        raise AssertionError("two attempts are all there are")

    def _begin(self) -> WorkerProcess:
        worker = self._start()
        with self._changed:
            self._workers.add(worker)
            if self._closed:
                worker.kill()
        return worker

    def _end(self, worker: WorkerProcess) -> None:
        with self._changed:
            self._workers.discard(worker)
        worker.close()


def _is_nobody_s_fault(error: Exception) -> bool:
    """Whether a worker died of something from outside, so that asking another makes sense."""
    return type(error) is WorkerDied
