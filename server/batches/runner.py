"""Batches under way: each in a task, a bounded number of their lines at work, all of them behind everybody else's.

Lives on the event loop; what touches the disk is done in threads. A batch goes on where it was when the server starts
again: a line is answered until its answer is kept, and what is kept is never asked again.
"""

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from structlog import get_logger

from manylora.adapters.errors import AdapterError
from manylora.server.batches.ending import finish, give_up_rest
from manylora.server.batches.files import FileStore
from manylora.server.batches.lines import FAILED, Answered, Line, check, lines_of, usage_of, written
from manylora.server.batches.records import DAY, Batch, BatchError, Counts, Status, StoredFile, Usage
from manylora.server.batches.turns import Turns
from manylora.server.errors import InvalidRequest, ObjectNotFound, QueueFull
from manylora.server.threads import step_back

log = get_logger(__name__)
Result = TypeVar("Result")
Answer = Callable[[str, str, bytes], Awaitable[Answered]]
"""Answers one request: for a caller of that name, at an endpoint, a body."""
MOST_UNFINISHED = 64
"""Batches of one owner that are not over."""
READ_AHEAD = 64
"""Lines that are read at once."""
THREADS = 2
"""For what reads or writes whole files of batches: it keeps no other request from the server's own."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
"""Seconds before a line is tried again that found the server busy, or a disk full."""


@dataclass(slots=True)
class _Work:
    """A batch under way."""

    batch: Batch
    task: "asyncio.Task[None] | None" = None
    running: "asyncio.Task[None] | None" = None
    """What answers its lines, and can be ended."""
    fault: BatchError | None = None
    """Why it can't go on: it ends with what is answered."""
    ending: bool = False
    """Whether how it ends is settled."""


class Batches:
    """``open`` before use, ``close`` at the end."""

    def __init__(self, files: FileStore, *, in_flight: int, largest_line: int) -> None:
        """``in_flight``: lines of all batches that are with the engine; ``largest_line``: bytes of one."""
        self.files = files
        self._database = files.database
        self._largest = largest_line
        self._in_flight = in_flight
        self._work: dict[str, _Work] = {}
        self._made = Counter[str]()
        self._threads = ThreadPoolExecutor(THREADS, "batch", step_back)
        self._answer: Answer | None = None
        self._sweeping: asyncio.Task[None] | None = None

    async def open(self, answer: Answer) -> None:
        """Go on with what was not over when the server ended."""
        self._answer = answer
        self._turns = Turns(self._in_flight)
        for batch in await asyncio.to_thread(self._database.unfinished):
            self._begin(batch)
        self._sweeping = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Stop where they are."""
        tasks = [work.task for work in self._work.values() if work.task is not None]
        if self._sweeping is not None:
            tasks.append(self._sweeping)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self.files.close)

    async def create(
        self,
        owner: str,
        key: str,
        endpoint: str,
        input_file_id: str,
        metadata: Mapping[str, str],
        output_seconds: int | None,
    ) -> Batch:
        """Begin a batch. Raises InvalidRequest, QueueFull, and what the disk raises."""
        try:
            file = await asyncio.to_thread(self.files.get, input_file_id, owner)
        except ObjectNotFound as error:
            raise InvalidRequest(error.message, param="input_file_id") from None
        if file.purpose != "batch":
            raise InvalidRequest(
                f"the file's purpose is {file.purpose!r}: a batch reads one of purpose 'batch'",
                param="input_file_id",
            )
        now = int(time.time())
        identity = f"batch_{uuid.uuid4().hex}"
        batch = Batch(
            identity,
            owner,
            key,
            endpoint,
            input_file_id,
            now,
            now + DAY,
            metadata=dict(metadata),
            output_seconds=output_seconds,
            times={"validating": now},
        )
        with self._counted(owner):
            await _whole(self._make(file, batch))
        return batch

    async def get(self, batch_id: str, owner: str) -> Batch:
        """Return an owner's batch as it is now. Raises ObjectNotFound."""
        work = self._work.get(batch_id)
        found = await asyncio.to_thread(self._database.batch, batch_id) if work is None else work.batch
        if found is None or found.owner != owner:
            raise ObjectNotFound(f"No batch found with id '{batch_id}'", param="batch_id")
        return found

    async def list(self, owner: str, after: str | None, limit: int) -> Sequence[Batch]:
        """Return some of an owner's batches, the newest first. Raises ObjectNotFound for an ``after`` not his."""
        if after is not None:
            await self.get(after, owner)
        found = await asyncio.to_thread(self._database.batches, owner, after, limit)
        return [self._work[each.id].batch if each.id in self._work else each for each in found]

    async def cancel(self, batch_id: str, owner: str) -> Batch:
        """Have a batch end with what is there. Raises ObjectNotFound, InvalidRequest if it is over."""
        batch = await self.get(batch_id, owner)
        work = self._work.get(batch_id)
        if batch.is_over or work is None or batch.status == "finalizing":
            raise InvalidRequest(f"the batch is {batch.status}: it can't be cancelled any more")
        if batch.status != "cancelling":
            if work.ending:
                raise InvalidRequest("the batch is ending: it can't be cancelled any more")
            await self._become(work, "cancelling")
            if work.running is not None:
                work.running.cancel()
        return work.batch

    @contextlib.contextmanager
    def _counted(self, owner: str) -> Iterator[None]:
        """Count a batch of an owner that is being made. Raises QueueFull if he has too many."""
        mine = self._made[owner] + sum(work.batch.owner == owner for work in self._work.values())
        if mine >= MOST_UNFINISHED:
            raise QueueFull(
                f"{mine} batches are not over yet, at most {MOST_UNFINISHED} may be", retry_after=60
            )
        self._made[owner] += 1
        try:
            yield
        finally:
            self._made[owner] -= 1
            self._made += Counter()  # without those at none

    async def _make(self, file: StoredFile, batch: Batch) -> None:
        await asyncio.to_thread(self._keep_new, file, batch)
        self._begin(batch)

    def _keep_new(self, file: StoredFile, batch: Batch) -> None:
        try:
            self.files.take_input(file, batch.id)
            self._database.add_batch(batch)
        except ObjectNotFound as error:
            raise InvalidRequest(error.message, param="input_file_id") from None
        except BaseException:
            self.files.drop_input(batch.id)
            raise

    def _begin(self, batch: Batch) -> None:
        work = self._work[batch.id] = _Work(batch)
        work.task = asyncio.create_task(self._run(work))

    async def _run(self, work: _Work) -> None:
        """Bring a batch to its end, whatever happens on the way."""
        pause = SHORTEST_PAUSE
        while True:
            try:
                await self._advance(work)
                break
            except (AdapterError, OSError) as error:
                # A full disk ends nothing: what is kept stays, and it goes on when there is room.
                log.warning("a batch can't go on now", batch=work.batch.id, reason=str(error))
                if isinstance(error, FileNotFoundError) and not self._has_input(work):
                    work.fault = BatchError("input_lost", "the batch's input is gone from the server's disk")
            except Exception as error:
                log.error("a batch failed", batch=work.batch.id, exc_info=error)
                work.fault = BatchError("internal_error", "the server failed on this batch")
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)
        del self._work[work.batch.id]

    def _has_input(self, work: _Work) -> bool:
        return self.files.input_of(work.batch.id).exists()

    async def _advance(self, work: _Work) -> None:
        if work.fault is not None:
            await self._break_off(work, work.fault)
            return
        if "in_progress" not in work.batch.times and not await self._validate(work):
            return
        if work.batch.status == "in_progress":
            await self._answer_all(work)
        path = self.files.input_of(work.batch.id)
        if work.batch.status == "cancelling":
            rest = "batch_cancelled", "This request was not answered before the batch was cancelled."
            await self._at_length(give_up_rest, self._database, work.batch, path, self._largest, rest)
            await self._end(work, "cancelled")
        elif time.time() >= work.batch.expires_at and work.batch.status != "finalizing":
            work.ending = True
            rest = "batch_expired", "This request was not answered within the completion window."
            await self._at_length(give_up_rest, self._database, work.batch, path, self._largest, rest)
            await self._end(work, "expired")
        else:
            await self._become(work, "finalizing")
            await self._end(work, "completed")

    async def _validate(self, work: _Work) -> bool:
        batch = work.batch
        path = self.files.input_of(batch.id)
        found = await self._at_length(check, path, batch.endpoint, self._largest)
        counts = Counts(found.total)
        if found.errors:
            await self._end(work, "failed", *found.errors)
            return False
        work.batch = replace(work.batch, counts=counts, model=found.model)
        if work.batch.status != "cancelling":
            await self._become(work, "in_progress")
        return True

    async def _answer_all(self, work: _Work) -> None:
        """Answer lines until all are, the batch's time is over, or it is cancelled."""
        batch_id = work.batch.id
        counts, usage = await asyncio.to_thread(self._database.totals, batch_id)
        work.batch = replace(work.batch, counts=replace(counts, total=work.batch.counts.total), usage=usage)
        work.running = asyncio.create_task(self._answer_lines(work))
        try:
            async with asyncio.timeout(max(0.0, work.batch.expires_at - time.time())):
                await work.running
        except TimeoutError:
            return
        except asyncio.CancelledError:
            # Of the lines alone, or of all because the server ends?
            if work.batch.status != "cancelling":
                raise
        finally:
            work.running.cancel()
            await asyncio.gather(work.running, return_exceptions=True)
            work.running = None

    async def _answer_lines(self, work: _Work) -> None:
        batch = work.batch
        done = await asyncio.to_thread(self._database.answered, batch.id)
        lines = lines_of(self.files.input_of(batch.id), self._largest, done)

        def some() -> list[Line]:
            return list(islice(lines, READ_AHEAD))

        # A line that must wait before it is tried again holds a place of its own batch alone.
        places = asyncio.Semaphore(self._in_flight)
        try:
            async with asyncio.TaskGroup() as group:
                while read := await self._at_length(some):
                    for line in read:
                        await places.acquire()
                        task = group.create_task(self._answer_line(work, line))
                        task.add_done_callback(lambda _: places.release())
        except ExceptionGroup as failed:
            # A line's own faults are its answer: this one the batch can't go on with, perhaps for now.
            raise failed.exceptions[0] from failed

    async def _answer_line(self, work: _Work, line: Line) -> None:
        batch = work.batch
        try:
            answer = await self._final(batch, line)
            usage = await asyncio.to_thread(usage_of, answer)
        except Exception as error:
            log.error("a batch's line failed", batch=batch.id, line=line.number, exc_info=error)
            answer, usage = FAILED, Usage()
        good, text = answer.status == 200, written(line.custom_id, answer)

        def keep() -> bool:
            return self._database.add_result(batch.id, line.number, text, usage, good=good)

        if await self._kept(batch, keep):
            _count(work, usage, good=good)

    async def _final(self, batch: Batch, line: Line) -> Answered:
        """Return what a line gets once the server isn't too busy for it."""
        pause = SHORTEST_PAUSE
        assert self._answer is not None
        while True:
            async with self._turns.turn(batch.owner):
                answer = await self._answer(batch.key, batch.endpoint, line.body)
            if answer.final:
                return answer
            await asyncio.sleep(max(pause, answer.retry_after or 0.0))
            pause = min(LONGEST_PAUSE, 2 * pause)

    @staticmethod
    async def _kept(batch: Batch, keep: Callable[[], bool]) -> bool:
        """Return what ``keep`` does, once there is room on the disk."""
        pause = SHORTEST_PAUSE
        while True:
            try:
                return await _whole(asyncio.to_thread(keep))
            except (AdapterError, OSError) as error:
                log.warning("an answer can't be kept now", batch=batch.id, reason=str(error))
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)

    async def _break_off(self, work: _Work, fault: BatchError) -> None:
        """End one that can't go on, with the answers that are there."""
        work.ending = True
        if "in_progress" in work.batch.times and self._has_input(work):
            path = self.files.input_of(work.batch.id)
            rest = fault.code, "This request was not answered: the server failed on its batch."
            try:
                await self._at_length(give_up_rest, self._database, work.batch, path, self._largest, rest)
            except (AdapterError, OSError):
                raise
            except Exception as error:
                log.error("what a batch left can't be told", batch=work.batch.id, exc_info=error)
        await self._end(work, "failed", fault)

    async def _end(self, work: _Work, status: Status, *errors: BatchError) -> None:
        """Write the files, and be over."""
        work.ending = True
        counts, usage = await asyncio.to_thread(self._database.totals, work.batch.id)
        total = max(work.batch.counts.total, counts.completed + counts.failed)
        over = replace(work.batch, counts=replace(counts, total=total), usage=usage, errors=errors)
        last = self._at(over, status)
        work.batch = await _whole(self._at_length(finish, self.files, last))

    async def _at_length(self, call: Callable[..., Result], *arguments: object) -> Result:
        """Return what a call returns that may take long, made in a thread of the batches' own."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def _become(self, work: _Work, status: Status) -> None:
        work.batch = self._at(work.batch, status)
        await asyncio.to_thread(self._database.put_batch, work.batch)

    @staticmethod
    def _at(batch: Batch, status: Status) -> Batch:
        times = batch.times if status in batch.times else {**batch.times, status: int(time.time())}
        return replace(batch, status=status, times=times)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(3600)
            with contextlib.suppress(AdapterError, OSError):
                await asyncio.to_thread(self.files.sweep)


async def _whole(work: Coroutine[object, object, Result]) -> Result:
    """Wait for what must not be left half done: whoever is cancelled meanwhile is so afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


def _count(work: _Work, usage: Usage, *, good: bool) -> None:
    counts, before = work.batch.counts, work.batch.usage
    more = replace(counts, completed=counts.completed + good, failed=counts.failed + (not good))
    total = Usage(
        before.prompt + usage.prompt, before.completion + usage.completion, before.cached + usage.cached
    )
    work.batch = replace(work.batch, counts=more, usage=total)
