"""Which sequences compute how many tokens in the next step. Integers only; runs nothing.

Running sequences decode first; what is left of the token budget goes to prompts, in chunks. Clients' requests take
turns, and none is to feel how much another asks for. Who runs nothing begins before the further prompts and choices of
those who do, if need be in the place of the youngest of whoever runs most; beside others these further ones share what
a step may attend to. A request that waits for arena rows may be overtaken a bounded number of times by users of
adapters that others might have to give up.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import attrgetter
from typing import NamedTuple

from manylora.server.engine.activation import AdapterKey
from manylora.server.engine.adapter_cache import AdapterCache, ArenaChange, Placement
from manylora.server.engine.block_manager import BlockManager
from manylora.server.engine.crowd import with_room
from manylora.server.engine.pace import Allowance, Pace
from manylora.server.engine.request import FinishReason
from manylora.server.engine.sequence import LiveRequest, Sequence, SequenceStatus
from manylora.server.engine.waiting import WaitingQueue

_READ_AHEAD = 4
"""Lines, from the head of the queue, whose first one's adapters are read from disk and kept on the host."""
_LOOK_AHEAD = 512
"""Lines that are looked through for those."""
_LOGPROB_CHUNK = 256
"""Prompt tokens a step when each needs its logits: a row of 150,000 floats takes 0.6 MB."""
_LOGPROB_COST = 3
"""Prompt tokens that one of these takes the time of."""
_FORCED = 64
"""Tokens that a stream was given without computing them, at most, for it to go before the prompts."""

_AGE = attrgetter("number")
_ALONE = 4
"""How many times as far it goes for a request that runs alone: a newcomer waits for one such step."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of the queue."""

    max_running: int = 256
    max_step_tokens: int = 2048
    adapter_timeout: float = 30.0
    """Seconds that a request may wait for its adapters."""
    max_overtakes: int = 64
    """Times that a request waiting for rows may be overtaken."""
    max_step_context: int = 8192
    """Tokens that a step's decodes attend to: each client's request has one sequence in every step, and further ones
    as far as this goes."""


class ScheduledRow(NamedTuple):
    """Tokens [start, start + length) of a sequence; ``samples`` when its next token comes out of them."""

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def cost(self) -> int:
        """How much of a step's budget it takes."""
        return self.length * (_LOGPROB_COST if self.sequence.wants_prompt_logprobs else 1)


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
    allowance: Allowance = field(default_factory=Allowance.everything)
    rows: dict[int, ScheduledRow] = field(default_factory=dict)
    changes: list[ArenaChange] = field(default_factory=list)
    admitted: list[LiveRequest] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[LiveRequest] = field(default_factory=list)
    head: LiveRequest | None = None
    """The first request that finds no rows: nobody behind it may take rows."""

    @property
    def full(self) -> bool:
        """Whether no further chunk has a place."""
        return self.budget <= 0 or self.allowance.spent


class Scheduler:
    """The queue, the running sequences, and the decisions of each step."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        cache: AdapterCache,
        live: Mapping[str, LiveRequest],
    ) -> None:
        """``live`` are the requests that have not ended, by id; read here, kept by LiveRequests."""
        self.limits = limits
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.wanted: frozenset[int] = frozenset()
        """Adapters whose host copies the head of the queue is about to need."""
        self._blocks = blocks
        self._cache = cache
        self._live = live
        self.pace = Pace()
        self._steps = 0
        self._overtaken: LiveRequest | None = None
        self._overtakes = 0
        # Every running sequence must be able to find a token in a step.
        self._max_running = min(limits.max_running, limits.max_step_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.add(sequence)

    def in_use(self) -> set[int]:
        """Return the adapters that requests which have begun still need."""
        begun = (live for live in self._live.values() if live.admitted is not None)
        return {adapter_id for live in begun for adapter_id in live.adapter_ids}

    def next_deadline(self) -> float | None:
        """Return when the first waiting request will have waited too long for its adapters."""
        since = [s.owner.blocked_since for s in self.waiting if s.owner.blocked_since is not None]
        return min(since) + self.limits.adapter_timeout if since else None

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step; blocks and rows are given out, nothing is computed."""
        self._steps += 1
        draft = _Draft(self.limits.max_step_tokens)
        self._continue(draft)
        if not draft.preempted and self.waiting.num_lines:
            self._admit(draft, now)
        self.wanted = self._read_ahead()
        loads = frozenset(i for i in self.wanted if self._cache.tier(i) == "disk")
        rows = sorted(draft.rows.values(), key=_place)
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
        else:
            self.waiting.remove(sequence)
        sequence.finish(reason)

    def _continue(self, draft: _Draft) -> None:
        decodes, prompts = self._in_turn()
        self._advance(decodes, draft)
        if count := len(draft.rows):  # streams wait for the prompts that come in beside them
            draft.allowance = self.pace.beside_decodes(count, self._streams(count, prompts))
        self._advance(prompts, draft)

    def _streams(self, decodes: int, prompts: list[Sequence]) -> int:
        """Return how many will decode once these prompts are in, and those that wait, have room and are as urgent."""
        urgent = min(s.priority for s in self.running)
        first = islice(self.waiting.firsts(), self._max_running - len(self.running))
        due = (s for s in with_room(first, self._blocks, self._cache) if s.priority <= urgent)
        return decodes + sum(s.owner.request.goes_on for s in chain(prompts, due))

    def _advance(self, sequences: list[Sequence], draft: _Draft) -> None:
        for sequence in sequences:
            if draft.full:
                return
            if sequence.status is SequenceStatus.RUNNING and self._secure(sequence, draft):
                self._chunk(sequence, draft)

    def _in_turn(self) -> tuple[list[Sequence], list[Sequence]]:
        """Return the running sequences that have a part in this step, decodes and prompts, older ones first.

        Streams whose grammar gave them tokens share with the prompts what a step has beside its decodes, as these are
        computed like theirs; but they go first, in turn: else they would stand still while an older prompt comes in.
        """
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            left = len(sequence.token_ids) - sequence.num_computed_tokens
            (decodes if left == 1 else prompts).append(sequence)
        origins = len({s.owner.origin for s in self.running})
        if origins < len(self.running):
            decodes = self._share(decodes, self.limits.max_step_context * (1 if origins > 1 else _ALONE))
        decodes.sort(key=_AGE)
        prompts.sort(key=_turn)
        return decodes, prompts

    def _share(self, decodes: list[Sequence], most: int) -> list[Sequence]:
        """Return one decode of each client's request, and further ones until ``most`` tokens are attended to.

        Those that longest had no part come first; of each request as many as of any other, if it has so many.
        """
        taken: Counter[str] = Counter()
        rounds: dict[int, list[Sequence]] = {}
        for sequence in sorted(decodes, key=lambda s: (s.last_step, s.number)):
            rounds.setdefault(taken[sequence.owner.origin], []).append(sequence)
            taken[sequence.owner.origin] += 1
        chosen = rounds.pop(0, [])
        context = sum(len(s.token_ids) for s in chosen)
        for number in sorted(rounds):
            for sequence in rounds[number]:
                context += len(sequence.token_ids)
                if context > most:
                    return chosen
                chosen.append(sequence)
        return chosen

    def _secure(self, sequence: Sequence, draft: _Draft) -> bool:
        """Get blocks for all tokens so far, from another if need be; False if that was ``sequence``."""
        if len(sequence.token_ids) <= sequence.room:
            return True
        while not self._blocks.can_grow(sequence.number, len(sequence.token_ids)):
            victim, _ = self._victim()
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        sequence.room = self._blocks.grow(sequence.number, len(sequence.token_ids))
        return True

    def _victim(self) -> tuple[Sequence, int]:
        """Return whom to preempt, the youngest of the request that runs most, and how many that runs.

        Of the least urgent that run; so the oldest of the others is safe as long as anyone else runs.
        """
        running = self._running_by_origin()
        found = max(self.running, key=lambda s: (s.priority, running[s.owner.origin], s.number))
        return found, running[found.owner.origin]

    def _running_by_origin(self) -> Counter[str]:
        return Counter(s.owner.origin for s in self.running)

    def _preempt(self, sequence: Sequence, draft: _Draft) -> None:
        row = draft.rows.pop(sequence.number, None)
        if row is not None:
            draft.budget += row.cost
            if sequence.num_to_compute > 1:
                draft.allowance.give_back(row.start, row.cost)
        self._blocks.free(sequence.number)
        self.running.remove(sequence)
        sequence.preempt()
        self.waiting.put_back(sequence)
        draft.preempted.append(sequence)

    def _chunk(self, sequence: Sequence, draft: _Draft) -> None:
        start = sequence.num_computed_tokens
        length = left = len(sequence.token_ids) - start
        if left > 1:
            most = max(1, min(draft.budget, draft.allowance.tokens(start)))
            if sequence.wants_prompt_logprobs:
                most = min(_LOGPROB_CHUNK, -(-most // _LOGPROB_COST))
            length = sequence.stages.alike(start, min(left, most))
        samples = sequence.pooling is None and length == left
        row = ScheduledRow(sequence, start, length, samples)
        draft.rows[sequence.number] = row
        draft.budget -= row.cost
        if left > 1:
            draft.allowance.take(start, row.cost)
        sequence.last_step = self._steps

    def _admit(self, draft: _Draft, now: float) -> None:
        in_use = self.in_use()
        turns = self.waiting.turns(self._running_by_origin())
        while turns:
            again = []
            for origin in turns:
                sequence = self.waiting.first(origin)
                if draft.full:
                    return
                if sequence is None:
                    continue
                if not self._may_begin(sequence, in_use, draft):
                    self._note_blocked(sequence, draft, now)
                    continue
                prefix = self._make_room(sequence, draft)
                if prefix is None:
                    return
                self._begin(sequence, prefix, in_use, draft, now)
                again.append(origin)
            turns = again

    def _make_room(self, sequence: Sequence, draft: _Draft) -> list[int] | None:
        """Return the cached blocks that begin the sequence, once it has room; None if it must wait for that."""
        while True:
            prefix: list[int] = []
            if not sequence.shuns_prefixes:
                scope = sequence.owner.request.cache_scope
                prefix = self._blocks.match(sequence.stages, sequence.token_ids, scope)
            fits = self._blocks.can_allocate(prefix, len(sequence.token_ids))
            if fits and len(self.running) < self._max_running:
                return prefix
            if any(s.owner.origin == sequence.owner.origin for s in self.running) or not self.running:
                return None
            victim, running = self._victim()
            if (victim.priority, running) <= (sequence.priority, 1):
                return None
            self._preempt(victim, draft)

    def _may_begin(self, sequence: Sequence, in_use: set[int], draft: _Draft) -> bool:
        """Say whether the sequence's adapters are on the device, or can be put there in its turn."""
        ids = sequence.adapter_ids
        if not ids:
            return True
        if self._cache.resident(ids):
            patience_over = draft.head is not None and self._overtakes >= self.limits.max_overtakes
            begun = sequence.owner.admitted is not None
            return begun or not (patience_over and self._cache.evictable(ids))
        placement = Placement.NO_ROOM if draft.head is not None else self._cache.can_place(ids, in_use)
        if placement is Placement.LOADABLE:
            return True
        if placement is Placement.FRAGMENTED:
            draft.changes += self._cache.tidy(ids, in_use)
        if placement in (Placement.NO_ROOM, Placement.FRAGMENTED) and draft.head is None:
            draft.head = sequence.owner
            if self._overtaken is not draft.head:
                self._overtaken, self._overtakes = draft.head, 0
        return False

    def _read_ahead(self) -> frozenset[int]:
        """Return the adapters of the first lines that wait for theirs: to be read, and kept on the host."""
        wanted: set[int] = set()
        found = 0
        for sequence in islice(self.waiting.firsts(), _LOOK_AHEAD):
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
        scope = live.request.cache_scope
        cached = self._blocks.allocate(sequence.number, sequence.stages, prefix, scope)
        sequence.room = self._blocks.grow(sequence.number, len(sequence.token_ids))
        if sequence.status is SequenceStatus.WAITING:
            self._blocks.count_query(sequence.num_prompt_tokens, cached)
        self.waiting.take(live.origin)
        sequence.admit(cached)
        live.blocked_since = None
        if live.admitted is None:
            live.admitted = now
            draft.admitted.append(live)
        self.running.append(sequence)
        self._chunk(sequence, draft)


def _turn(sequence: Sequence) -> tuple[bool, int, int]:
    """Return what sequences with more than a token to compute are in order of: streams before prompts."""
    streams = sequence.num_output_tokens > 0 and sequence.num_to_compute <= _FORCED
    return not streams, sequence.last_step if streams else 0, sequence.number


def _place(row: ScheduledRow) -> tuple[bool, AdapterKey]:
    """Return what rows are in order of: decodes first, and those of the same adapters together."""
    return row.length > 1, row.sequence.stages.at(row.start)
