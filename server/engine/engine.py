"""The engine: requests and adapters in, one mixed step at a time, outputs out. Synchronous, one thread's own.

A step is schedule → run → commit. A fault in it fails the requests that it computed and nothing else.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from manylora.adapters.types import AdapterWeights, FreedAdapter
from manylora.adapters.vocabulary import UNIT, VOCABULARY
from manylora.server.engine.activation import stages_of
from manylora.server.engine.adapter_cache import AdapterCache, HeldAdapter
from manylora.server.engine.arena_writer import Arena, ArenaWriter
from manylora.server.engine.auditing import Auditor
from manylora.server.engine.block_manager import BlockManager
from manylora.server.engine.detokenizer import TokenDecoder
from manylora.server.engine.door import check_request
from manylora.server.engine.faults import step_failed
from manylora.server.engine.grammar import GrammarFault
from manylora.server.engine.health import Health
from manylora.server.engine.leaving import Freed, Leaving
from manylora.server.engine.model_runner import LaunchedStep, ModelRunner, StepModel, StepResult
from manylora.server.engine.observer import EngineObserver, SilentEngineObserver, StepTimings
from manylora.server.engine.outbox import wake
from manylora.server.engine.request import FinishReason, GenerationRequest
from manylora.server.engine.requests import LiveRequests
from manylora.server.engine.residency import Load, Residency
from manylora.server.engine.sampler import Sampler
from manylora.server.engine.scheduler import Scheduler
from manylora.server.engine.sequence import LiveRequest, SequenceStatus
from manylora.server.engine.step_plan import ScheduledRow, SchedulerLimits, StepPlan
from manylora.server.errors import (
    AdapterUnavailable,
    ModelNotFound,
    NotFinite,
    ServerError,
    StepFailed,
)
from manylora.server.kernels.step import LORA_MODULES, AdapterRanges

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes of the pools and limits of a step; measured at start, never changed."""

    vocab_size: int
    num_blocks: int
    block_size: int
    arena_rows: int
    """Rank rows of each module."""
    host_bytes: int
    """Memory for adapters on the host."""
    row_bytes: Mapping[str, int]
    """Bytes of one rank row over all layers, by module."""
    limits: SchedulerLimits
    vocabulary_bytes: int = 1 << 30
    """Memory on the device for adapters' own embeddings and heads."""


class Engine:
    """Owns all mutable state of serving. Not thread-safe: AsyncEngine gives it a thread."""

    def __init__(
        self,
        model: StepModel,
        arena: Arena,
        decoder: TokenDecoder,
        eos_ids: frozenset[int],
        settings: EngineSettings,
        device: torch.device,
        load: Load,
        observer: EngineObserver | None = None,
    ) -> None:
        self.settings = settings
        self.blocks = BlockManager(settings.num_blocks, settings.block_size)
        rows = dict.fromkeys(LORA_MODULES, settings.arena_rows)
        rows[VOCABULARY] = settings.vocabulary_bytes // UNIT
        self.cache = AdapterCache(rows, settings.host_bytes, {**settings.row_bytes, VOCABULARY: UNIT})
        live: dict[str, LiveRequest] = {}
        self.scheduler = Scheduler(settings.limits, self.blocks, self.cache, live)
        self._observer: EngineObserver = observer or SilentEngineObserver()
        self.health = Health(settings.vocab_size)
        self.requests = LiveRequests(live, self.scheduler, decoder, eos_ids, self._observer, self.health)
        writer = ArenaWriter(arena, self.cache, self._observer)
        self._residency = Residency(self.cache, writer, self.scheduler, self.requests, load)
        self._leaving = Leaving(self.cache, writer.release, self._forget)
        self.auditor = Auditor()
        self.preemptions = 0
        self._runner = ModelRunner(
            model,
            Sampler(settings.vocab_size, device, model.sampling),
            settings.block_size,
            self.blocks.table,
            self._ranges,
        )

    # Requests

    def check(self, request: GenerationRequest) -> None:
        """Refuse at the door what can't be run. Callable from any thread.

        Raises ModelNotFound for an adapter that is unknown or leaving, and InvalidRequest.
        """
        check_request(request, self.settings.vocab_size, self.cache)

    def add_request(self, request: GenerationRequest) -> None:
        """Queue a request; one that can't be queued (its adapter has gone meanwhile) fails, and is told."""
        try:
            self.check(request)
            prompt = request.prompt_token_ids
            stages = stages_of(request.adapters, prompt, lambda each: self.cache[each].invocation)
            self.requests.add(request, stages)
        except ServerError as error:
            self.requests.refuse(request, error)
        except Exception as error:
            log.error("request %s could not be queued", request.request_id, exc_info=error)
            self.requests.refuse(
                request, StepFailed(f"the request could not be queued: {type(error).__name__}")
            )

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds; nothing happens if it has ended."""
        live = self.requests.get(request_id)
        if live is not None:
            self.requests.end(live, FinishReason.ABORTED, None)
            self._release()

    def capacity_tokens(self) -> int:
        """Return how many tokens one sequence can have at most."""
        return self.settings.num_blocks * self.settings.block_size

    # Adapters

    def add_adapter(self, held: HeldAdapter) -> None:
        """Take in an adapter; see Residency.add."""
        self._residency.add(held)

    def pin(self, adapter_id: int, *, pinned: bool) -> None:
        """Pin an adapter where it is, or unpin it."""
        self._leaving.stay(adapter_id)
        self.cache[adapter_id].pinned = pinned
        self._residency.trim()

    def preload(self, adapter_id: int, weights: AdapterWeights | None) -> bool:
        """Put an adapter on the device; False: it is on its way; see Residency.preload."""
        self._leaving.stay(adapter_id)
        return self._residency.preload(adapter_id, weights)

    def remove_adapter(self, adapter_id: int, freed: Freed, *, abort: bool) -> None:
        """Refuse new requests for an adapter; once nobody uses it, give its memory back and call ``freed``."""
        if adapter_id not in self.cache:
            freed(FreedAdapter(0, 0, 0, 0))
            return
        aborted = 0
        if abort:
            error = ModelNotFound("the adapter was deleted while it answered", param="model")
            for live in self.requests:
                if adapter_id in live.adapter_ids:
                    aborted += len(live.live) + live.num_unmade
                    self.requests.end(live, FinishReason.ABORTED, error)
        self._leaving.remove(adapter_id, freed, aborted)
        self._release()

    def rest_adapter(self, adapter_id: int) -> None:
        """Unpin an adapter; once nobody uses it, it is on disk only, until somebody asks for it again."""
        self._leaving.rest(adapter_id)
        self._release()

    def host_loaded(self, adapter_id: int, weights: AdapterWeights | Exception) -> None:
        """Take in weights read from disk, or fail the requests that waited for them."""
        self._residency.loaded(adapter_id, weights)
        self._release()

    # Steps

    def step(self, meanwhile: Callable[[], int] = lambda: -1) -> bool:
        """Run one step; False if there was nothing that could be computed now.

        ``meanwhile`` is called once the step has been launched: what it does costs no time where a device computes. It
        returns a file descriptor that gets a byte as soon as this thread needs the interpreter no more, or -1.
        """
        began = time.perf_counter()
        probe = self.health.take_probe(time.monotonic())
        if probe is not None:
            self.add_request(probe)
        self._residency.before_schedule()
        plan = self.scheduler.schedule(time.monotonic())
        self.preemptions += len(plan.preempted)
        self._expire(plan)
        self._residency.read(plan.loads)
        scheduled = time.perf_counter()
        changed = self._residency.add_changes(plan)
        if changed:
            wake(meanwhile())  # nobody should wait for copies who has a token already
            self._residency.change_arena(plan.rows)
        rows = tuple([row for row in plan.rows if row.sequence.status is SequenceStatus.RUNNING])
        placed = time.perf_counter()
        launched = self._launch(rows) if rows else None
        listener = meanwhile()
        if launched is None:
            wake(listener)
        else:
            self._collect(launched, listener, scheduled - began, placed - scheduled)
        self.requests.make_choices()
        self._residency.trim()
        self._release()
        self.blocks.sweep()
        self.auditor.go_on()
        return bool(plan.rows or plan.preempted or plan.expired or changed or self.auditor.busy)

    def _launch(self, rows: tuple[ScheduledRow, ...]) -> LaunchedStep | None:
        try:
            return self._runner.launch(rows)
        except Exception as error:
            self._fail_step(rows, error)
            return None

    def _collect(self, launched: LaunchedStep, listener: int, schedule: float, place: float) -> None:
        rows = launched.rows
        try:
            result = self._runner.collect(launched, listener)
        except Exception as error:
            self._fail_step(rows, error)
            return
        self.health.step_ended(well=True)
        computed = time.perf_counter()
        chunks = [(row.start, row.cost) for row in rows if row.length > 1]
        self._commit(rows, result)
        commit = time.perf_counter() - computed
        tokens = sum([row.length for row in rows])
        parts = (result.glue_seconds, result.model_seconds, result.sample_seconds, commit)
        self.scheduler.pace.note(len(rows) - len(chunks), chunks, sum(parts))
        self._observer.step_finished(StepTimings(schedule, place, *parts, tokens, len(rows)))

    def audit(self) -> Iterator[None]:
        """Check the pools' books in parts that take about a millisecond each; steps may be run between them.

        Raises AssertionError where they don't balance, or an idle engine still holds something.
        """
        yield from self.blocks.audit()
        yield from self.cache.audit()
        self._check_idle()

    def check_integrity(self) -> None:
        """Do that at once."""
        for _ in self.audit():
            pass

    def _check_idle(self) -> None:
        if not len(self.requests):
            assert self.blocks.num_free == self.settings.num_blocks, "blocks are held by nobody"
            assert not self.scheduler.running, "a sequence runs that belongs to no request"
            assert not self.scheduler.waiting.num_lines, "a sequence waits that belongs to no request"

    def _ranges(self, adapter_id: int) -> AdapterRanges:
        ranges = self.cache[adapter_id].ranges
        assert ranges is not None, "the scheduler placed it"
        return ranges

    def _expire(self, plan: StepPlan) -> None:
        seconds = self.settings.limits.adapter_timeout
        for live in plan.expired:
            count = len(live.adapter_ids)
            what = "adapter" if count == 1 else f"the {count} adapters of"
            message = (
                f"no room for {what} {live.request.adapter_label!r} within {seconds:g} s: all rows are in use"
            )
            self.requests.end(live, FinishReason.FAILED, AdapterUnavailable(message, retry_after=seconds))

    def _commit(self, rows: tuple[ScheduledRow, ...], result: StepResult) -> None:
        now = time.monotonic()
        faults = result.faults
        # What has ended meanwhile holds no blocks; what is not finite, or led to it, must not be found in the cache.
        self.scheduler.commit(
            [
                row
                for row in rows
                if row.sequence.status is SequenceStatus.RUNNING and row.sequence.number not in faults
            ]
        )
        for number, (row, token_id) in enumerate(zip(rows, result.token_ids, strict=True)):
            sequence = row.sequence
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # ended with another choice of its request
            if sequence.number in faults:
                error = NotFinite(faults[sequence.number].message)
                self.requests.end(sequence.owner, FinishReason.FAILED, error)
                continue
            try:
                if sequence.number in result.broken:
                    raise result.broken[sequence.number]
                if sequence.number in result.prompt_logprobs:
                    found = result.prompt_logprobs[sequence.number]
                    self.requests.take_prompt_logprobs(sequence, row.start, found)
                if sequence.pooling is not None:
                    self.requests.take_states(sequence, row.start, result.states.get(sequence.number))
                if token_id is not None:
                    self.requests.take_token(sequence, token_id, result.logprobs.get(number), now)
            except GrammarFault as fault:
                self.requests.fail_grammar(sequence.owner, fault)
            except Exception as error:
                failed = step_failed("turning this request's tokens into text failed", error)
                self.requests.end(sequence.owner, FinishReason.FAILED, failed)
        self.requests.step_ended()

    def _fail_step(self, rows: tuple[ScheduledRow, ...], error: Exception) -> None:
        """Fail the requests that the step computed. The others' KV and adapters are untouched by it."""
        self.health.step_ended(well=False)
        failed = step_failed("the step that computed this request failed", error)
        for row in rows:
            if row.sequence.status is not SequenceStatus.FINISHED:
                self.requests.end(row.sequence.owner, FinishReason.FAILED, failed)

    def _forget(self, adapter_id: int) -> None:
        self.blocks.forget_adapter(adapter_id)
        self._residency.forget(adapter_id)

    def _release(self) -> None:
        self._leaving.release(
            lambda: {adapter_id for live in self.requests for adapter_id in live.adapter_ids}
        )
