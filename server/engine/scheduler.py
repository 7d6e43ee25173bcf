"""Which sequences compute how many tokens in the next step. Integers only; runs nothing.

First come, first served. Running sequences decode first; what is left of the token budget goes to prompts, in
chunks. When blocks run out the youngest goes back to the queue. A request that waits for arena rows may
be overtaken a bounded number of times by users of adapters that others might have to give up.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from manylora.server.engine.adapter_cache import AdapterCache, ArenaChange, Placement
from manylora.server.engine.block_manager import BlockManager
from manylora.server.engine.request import FinishReason
from manylora.server.engine.sequence import LiveRequest, Sequence, SequenceStatus

_READ_AHEAD = 4
"""Waiting sequences, from the head of the queue, whose adapters are read from disk and kept on the host."""
_LOOK_AHEAD = 512
"""Waiting sequences that are looked through for those."""
_LOGPROB_CHUNK = 256
"""Prompt tokens a step when each needs its logits: a row of 150,000 floats takes 0.6 MB."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue."""

    max_running: int = 256
    max_step_tokens: int = 2048
    adapter_timeout: float = 30.0
    """Seconds that a request may wait for its adapters."""
    max_overtakes: int = 64
    """Times that a request waiting for rows may be overtaken."""


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Tokens [start, start + length) of a sequence; ``samples`` when its next token comes out of them."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do in one step, changes of the arena first."""

    rows: tuple[ScheduledRow, ...]
    changes: tuple[ArenaChange, ...]
    admitted: tuple[LiveRequest, ...]
    preempted: tuple[Sequence, ...]
    expired: tuple[LiveRequest, ...]
    """Waited too long for their adapters."""
    loads: frozenset[int]
    """Adapters to be read from disk."""


@dataclass(slots=True)
class _Draft:
    budget: int
    rows: dict[int, ScheduledRow] = field(default_factory=dict)
    changes: list[ArenaChange] = field(default_factory=list)
    admitted: list[LiveRequest] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[LiveRequest] = field(default_factory=list)
    head: LiveRequest | None = None
    """The first request that finds no rows: nobody behind it may take rows."""


class Scheduler:
    """The queue, the running sequences, and the decisions of each step."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, cache: AdapterCache) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.wanted: frozenset[int] = frozenset()
        """Adapters whose host copies the head of the queue is about to need."""
        self._blocks = blocks
        self._cache = cache
        self._overtaken: LiveRequest | None = None
        self._overtakes = 0
        # Every running sequence must find a token in each step.
        self._max_running = min(limits.max_running, limits.max_step_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def release_choices(self, live: LiveRequest) -> None:
        """Queue the choices that waited for the first one's prompt, ahead of everyone: they came with it."""
        held = [s for s in live.sequences if s.status is SequenceStatus.HELD]
        for sequence in held:
            sequence.release()
        self.waiting.extendleft(reversed(held))

    def in_use(self) -> set[int]:
        """Return the adapters that requests which have begun still need."""
        begun = (s for s in [*self.running, *self.waiting] if s.owner.admitted is not None)
        return {adapter_id for s in begun for adapter_id in s.adapter_ids}

    def next_deadline(self) -> float | None:
        """Return when the first waiting request will have waited too long for its adapters."""
        since = [s.owner.blocked_since for s in self.waiting if s.owner.blocked_since is not None]
        return min(since) + self.limits.adapter_timeout if since else None

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step; blocks and rows are given out, nothing is computed."""
        draft = _Draft(self.limits.max_step_tokens)
        self._continue(draft)
        if not draft.preempted and self.waiting:
            self._admit(draft, now)
        if draft.head is not None and draft.head is not self._overtaken:
            self._overtaken, self._overtakes = draft.head, 0
        self.wanted = self._read_ahead()
        loads = frozenset(i for i in self.wanted if self._cache.tier(i) == "disk")
        rows = sorted(draft.rows.values(), key=lambda row: row.sequence.adapters)
        return StepPlan(
            tuple(rows),
            tuple(draft.changes),
            tuple(draft.admitted),
            tuple(draft.preempted),
            tuple(draft.expired),
            loads,
        )

    def commit(self, rows: Iterable[ScheduledRow]) -> None:
        """Note that the rows' tokens are in the KV cache."""
        for row in rows:
            sequence = row.sequence
            sequence.num_computed_tokens = row.start + row.length
            self._blocks.commit(sequence.number, sequence.token_ids, sequence.num_computed_tokens)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Finish a sequence and take back what it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._blocks.free(sequence.number)
        elif sequence.status is not SequenceStatus.HELD:
            self.waiting.remove(sequence)
        sequence.finish(reason)

    def _continue(self, draft: _Draft) -> None:
        ordered = sorted(self.running, key=lambda s: (len(s.token_ids) - s.num_computed_tokens > 1, s.number))
        for sequence in ordered:
            if draft.budget <= 0:
                return
            if sequence.status is SequenceStatus.RUNNING and self._secure(sequence, draft):
                self._chunk(sequence, draft)

    def _secure(self, sequence: Sequence, draft: _Draft) -> bool:
        """Get blocks for all tokens so far, from the youngest if need be; False if that was ``sequence``."""
        while not self._blocks.can_grow(sequence.number, len(sequence.token_ids)):
            youngest = max(self.running, key=lambda s: s.number)
            self._preempt(youngest, draft)
            if youngest is sequence:
                return False
        self._blocks.grow(sequence.number, len(sequence.token_ids))
        return True

    def _preempt(self, sequence: Sequence, draft: _Draft) -> None:
        row = draft.rows.pop(sequence.number, None)
        draft.budget += row.length if row is not None else 0
        self._blocks.free(sequence.number)
        self.running.remove(sequence)
        sequence.preempt()
        self.waiting.appendleft(sequence)
        draft.preempted.append(sequence)

    def _chunk(self, sequence: Sequence, draft: _Draft) -> None:
        start = sequence.num_computed_tokens
        length = min(len(sequence.token_ids) - start, draft.budget)
        if sequence.wants_prompt_logprobs:
            length = min(length, _LOGPROB_CHUNK)
        samples = start + length == len(sequence.token_ids)
        draft.rows[sequence.number] = ScheduledRow(sequence, start, length, samples)
        draft.budget -= length

    def _admit(self, draft: _Draft, now: float) -> None:
        if draft.budget <= 0 or len(self.running) >= self._max_running:
            return
        in_use = self.in_use()
        for sequence in list(self.waiting):
            if draft.budget <= 0 or len(self.running) >= self._max_running:
                break
            if not self._may_begin(sequence, in_use, draft):
                self._note_blocked(sequence, draft, now)
                continue
            prefix: list[int] = []
            if not sequence.wants_prompt_logprobs:
                prefix = self._blocks.match(sequence.adapters, sequence.token_ids)
            if not self._blocks.can_allocate(prefix, len(sequence.token_ids)):
                break
            self._begin(sequence, prefix, in_use, draft, now)
        self.waiting = deque(s for s in self.waiting if s.status is not SequenceStatus.RUNNING)

    def _may_begin(self, sequence: Sequence, in_use: set[int], draft: _Draft) -> bool:
        """Say whether the sequence's adapters are on the device, or can be put there in its turn."""
        ids = sequence.adapter_ids
        if not ids:
            return True
        if self._cache.resident(ids):
            drained = draft.head is not None and draft.head is self._overtaken
            patience_over = drained and self._overtakes >= self.limits.max_overtakes
            begun = sequence.owner.admitted is not None
            return begun or not (patience_over and self._cache.evictable(ids))
        placement = Placement.NO_ROOM if draft.head is not None else self._cache.can_place(ids, in_use)
        if placement is Placement.LOADABLE:
            return True
        if placement is Placement.NO_ROOM and draft.head is None:
            draft.head = sequence.owner
        return False

    def _read_ahead(self) -> frozenset[int]:
        """Return the adapters of the first sequences that wait for theirs: to be read, and kept on the host."""
        wanted: set[int] = set()
        found = 0
        for sequence in islice(self.waiting, _LOOK_AHEAD):
            if not self._cache.resident(sequence.adapter_ids):
                wanted |= sequence.adapter_ids
                found += 1
                if found == _READ_AHEAD:
                    break
        return frozenset(wanted)

    def _note_blocked(self, sequence: Sequence, draft: _Draft, now: float) -> None:
        live = sequence.owner
        if live.blocked_since is None:
            live.blocked_since = now
        elif now - live.blocked_since >= self.limits.adapter_timeout and live.admitted is None:
            draft.expired.append(live)

    def _begin(
        self, sequence: Sequence, prefix: list[int], in_use: set[int], draft: _Draft, now: float
    ) -> None:
        live = sequence.owner
        if not self._cache.resident(sequence.adapter_ids):
            draft.changes += self._cache.place(sequence.adapter_ids, in_use)
        elif draft.head is not None and self._cache.evictable(sequence.adapter_ids):
            self._overtakes += 1
        self._cache.touch(sequence.adapter_ids)
        in_use |= sequence.adapter_ids
        cached = self._blocks.allocate(sequence.number, sequence.adapters, prefix)
        self._blocks.grow(sequence.number, len(sequence.token_ids))
        if sequence.status is SequenceStatus.WAITING:
            self._blocks.count_query(sequence.num_prompt_tokens, cached)
        sequence.admit(cached)
        live.blocked_since = None
        if live.admitted is None:
            live.admitted = now
            draft.admitted.append(live)
        self.running.append(sequence)
        self._chunk(sequence, draft)
