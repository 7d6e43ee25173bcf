"""Exports of adapters and mixtures as jobs: each in a process of its own, one after the other.

Lives on the event loop. Whatever a crash leaves is deleted at the next start; finished results stay until deleted.
What lies in a job's directory is said in homes.py.
"""

import asyncio
import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from structlog import get_logger

from manylora.server.errors import ModelNotFound, QueueFull, ShuttingDown
from manylora.server.exports.homes import keep_result, link_adapters, recover, settings_of
from manylora.server.exports.job import ExportedBase, ExportForm, ExportJob, ExportSource
from manylora.server.exports.process import NICENESS, ExportProcess

log = get_logger(__name__)
MOST_QUEUED = 16
MOST_NAMED = 20
"""Jobs that an error lists."""
MOST_FINISHED = 256
"""Failed and cancelled jobs that are remembered; succeeded ones stay with their results."""


class ExportJobs:
    """All jobs of a server. ``open`` before use, ``close`` at the end."""

    def __init__(self, directory: Path, base: ExportedBase, files_of: Callable[[str], Path]) -> None:
        self.directory = directory.absolute()
        self.base = base
        self._files_of = files_of
        self.niceness = NICENESS
        self._jobs: dict[str, ExportJob] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._running: dict[str, ExportProcess] = {}
        self._closed = False

    async def open(self) -> None:
        """Find the results of earlier runs, delete what a crash left, and begin to work."""
        self._jobs = await asyncio.to_thread(recover, self.directory)
        self._worker = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Stop the process that runs and delete what is unfinished."""
        self._closed = True
        for job in [job for job in self._jobs.values() if not job.is_over]:
            await self.cancel(job.adapter, job.id)
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker

    async def submit(self, source: ExportSource, form: ExportForm) -> ExportJob:
        """Queue an export of one version of an adapter or a mixture. Raises QueueFull, ShuttingDown or AdapterError."""
        if self._closed or self._worker is None:
            raise ShuttingDown("the server takes no exports now")
        if sum(job.status == "queued" for job in self._jobs.values()) >= MOST_QUEUED:
            raise QueueFull(f"{MOST_QUEUED} exports are waiting; try again when one is done", retry_after=30)
        job = ExportJob(
            id=f"export-{uuid.uuid4().hex[:16]}",
            adapter=source.name,
            version=source.version,
            digest=source.digest,
            created=int(time.time()),
            parts=source.parts,
            **asdict(form),
        )
        # It counts among those that wait before anything is waited for: another may be asked for meanwhile.
        self._jobs[job.id] = job
        try:
            await asyncio.to_thread(link_adapters, self.directory / job.id, job, self._files_of)
        except BaseException:
            self._jobs.pop(job.id, None)
            raise
        if self._jobs.get(job.id) is not job:  # cancelled meanwhile, and perhaps forgotten
            await asyncio.to_thread(shutil.rmtree, self.directory / job.id, ignore_errors=True)
            return self._jobs.get(job.id, replace(job, status="cancelled"))
        self._queue.put_nowait(job.id)
        return job

    def list(self, adapter: str | None = None) -> list[ExportJob]:
        """Return all jobs, or those of one adapter, oldest first."""
        return [job for job in self._jobs.values() if adapter is None or job.adapter == adapter]

    def get(self, adapter: str, job_id: str) -> ExportJob:
        """Return a job. Raises ModelNotFound with the jobs that the adapter has."""
        job = self._jobs.get(job_id)
        if job is None or job.adapter != adapter:
            known = ", ".join(each.id for each in self.list(adapter)) or "none"
            raise ModelNotFound(
                f"adapter {adapter[:200]!r} has no export {job_id[:200]!r}; exports: {known}", param="job"
            )
        return job

    def find(self, job_id: str) -> ExportJob:
        """Return a job, whatever it exports. Raises ModelNotFound with the jobs that there are."""
        job = self._jobs.get(job_id)
        if job is None:
            known = ", ".join(each.id for each in self.list(None)[:MOST_NAMED]) or "none"
            raise ModelNotFound(f"there is no export {job_id[:200]!r}; exports: {known}", param="job")
        return job

    async def cancel(self, adapter: str, job_id: str) -> ExportJob:
        """End a job that isn't over and delete what it made. Raises ModelNotFound."""
        job = self.get(adapter, job_id)
        if not job.is_over:
            job = self._change(job_id, status="cancelled", finished=int(time.time()))
            process = self._running.get(job_id)
            if process is not None:
                await asyncio.to_thread(process.stop)
            await asyncio.to_thread(shutil.rmtree, self.directory / job_id, ignore_errors=True)
        return job

    async def delete(self, adapter: str, job_id: str) -> ExportJob:
        """Forget a job that is over, and delete its result. Raises ModelNotFound."""
        job = self.get(adapter, job_id)
        self._jobs.pop(job_id)
        await asyncio.to_thread(shutil.rmtree, self.directory / job_id, ignore_errors=True)
        return job

    def _change(self, job_id: str, **changes: Any) -> ExportJob:
        job = self._jobs[job_id] = replace(self._jobs[job_id], **changes)
        return job

    def _is_running(self, job_id: str) -> bool:
        """Whether a job is still wanted: it may have been cancelled, and forgotten, while its process ended."""
        job = self._jobs.get(job_id)
        return job is not None and job.status == "running"

    async def _work(self) -> None:
        while True:
            job_id = await self._queue.get()
            job = self._jobs.get(job_id)
            if job is None or job.status != "queued":
                continue
            try:
                await self._run(job)
            except Exception as error:
                log.error("export failed", job=job_id, exc_info=error)
                if self._is_running(job_id):
                    self._fail(job_id, "the export could not be run; the fault is logged under its id")

    async def _run(self, job: ExportJob) -> None:
        home = self.directory / job.id
        self._change(job.id, status="running", started=int(time.time()), stage="starting")
        loop = asyncio.get_running_loop()

        def hear(stage: str, progress: float) -> None:
            loop.call_soon_threadsafe(self._advance, job.id, stage, progress)

        settings = json.dumps(settings_of(home, job, self.base))
        with ExportProcess(settings, self.niceness, home / "complaints") as process:
            self._running[job.id] = process
            try:
                outcome = await asyncio.to_thread(process.follow, hear)
            finally:
                del self._running[job.id]
        if not self._is_running(job.id):  # cancelled, and perhaps forgotten
            await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)
        elif isinstance(outcome, str):
            self._fail(job.id, outcome)
        else:
            await self._succeed(job.id, outcome)

    def _advance(self, job_id: str, stage: str, progress: float) -> None:
        if self._is_running(job_id):
            self._change(job_id, stage=stage, progress=progress)

    async def _succeed(self, job_id: str, manifest: dict[str, Any]) -> None:
        done = replace(
            self._jobs[job_id],
            status="succeeded",
            stage="done",
            progress=1.0,
            finished=int(time.time()),
            manifest=manifest,
        )
        kept = await asyncio.to_thread(keep_result, self.directory / job_id, done)
        if self._is_running(job_id):
            self._jobs[job_id] = kept
            log.info("exported", job=job_id, adapter=kept.adapter)

    def _fail(self, job_id: str, error: str) -> None:
        self._change(job_id, status="failed", finished=int(time.time()), error=error)
        log.warning("export failed", job=job_id, error=error)
        shutil.rmtree(self.directory / job_id, ignore_errors=True)
        over = [job.id for job in self._jobs.values() if job.status in ("failed", "cancelled")]
        for old in over[:-MOST_FINISHED]:
            del self._jobs[old]
