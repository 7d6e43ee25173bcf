"""Which sequences compute how many tokens in the next step. Integers only; runs nothing.

Running sequences decode first (turns.py); what is left of the token budget goes to prompts, in chunks (step_plan.py).
Who waits begins in turn (waiting.py): clients' requests, tenants, adapters, and none is to feel how much another asks
for. Who runs nothing begins before the further prompts and choices of those who do, if need be in the place of the
youngest of whoever runs most. Adapters get their rows in these turns too (adapter_room.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice

from manylora.server.engine.adapter_cache import AdapterCache
from manylora.server.engine.adapter_room import AdapterRoom
from manylora.server.engine.adapter_shares import AdapterShares
from manylora.server.engine.block_manager import BlockManager
from manylora.server.engine.crowd import with_room
from manylora.server.engine.pace import Pace
from manylora.server.engine.request import FinishReason
from manylora.server.engine.sequence import LiveRequest, Sequence, SequenceStatus
from manylora.server.engine.step_plan import Draft, ScheduledRow, SchedulerLimits, StepPlan
from manylora.server.engine.turns import in_turn
from manylora.server.engine.waiting import WaitingQueue


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
        self.shares = AdapterShares()
        self.waiting = WaitingQueue(self.shares)
        self.running: list[Sequence] = []
        self.wanted: frozenset[int] = frozenset()
        """Adapters whose host copies the head of the queue is about to need."""
        self._blocks = blocks
        self._cache = cache
        self._room = AdapterRoom(limits, cache)
        self._ahead: list[Sequence] = []
        """Those that began with what is the base's of their prompts, and had no adapters yet at the last step."""
        self._live = live
        self.pace = Pace()
        self._steps = 0
        self._found: tuple[int, int, list[int]] | None = None
        """Whose prefix was looked up last, what had been dropped of the cache then, and the blocks."""
        # Every running sequence must be able to find a token in a step.
        self._max_running = min(limits.max_running, limits.max_step_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.add(sequence)

    def in_use(self) -> set[int]:
        """Return the adapters that requests which have begun still need."""
        holding = (live for live in self._live.values() if live.holds_adapters)
        return {adapter_id for live in holding for adapter_id in live.adapter_ids}

    def next_deadline(self) -> float | None:
        """Return when the first waiting request will have waited too long for its adapters."""
        blocked = (s.owner.blocked_since for s in chain(self.waiting, self._ahead))
        since = [each for each in blocked if each is not None]
        return min(since) + self.limits.adapter_timeout if since else None

    def schedule(self, now: float) -> StepPlan:
        """Decide the next step; blocks and rows are given out, nothing is computed."""
        self._steps += 1
        draft = Draft(self.limits.max_step_tokens)
        if self._ahead:
            self._give_adapters(draft, now)
        if self.running:
            self._continue(draft)
        looked_at: Iterable[str] = ()
        if self.waiting.num_lines:
            turns = self.waiting.turns(self._running_by_origin())
            looked_at = chain([] if draft.preempted else self._admit(turns, draft, now), turns)
        self.wanted = self._room.read_ahead(chain(self._ahead, self._firsts(looked_at)))
        if draft.in_pieces:
            for row in [r for r in draft.rows.values() if not self._cache.resident(r.sequence.needed_ids)]:
                draft.drop(row.sequence)
        return draft.plan(frozenset(i for i in self.wanted if self._cache.tier(i) == "disk"))

    def commit(self, rows: Iterable[ScheduledRow]) -> None:
        """Note that the rows' tokens are in the KV cache."""
        for row in rows:
            sequence = row.sequence
            sequence.num_computed_tokens = row.start + row.length
            self._blocks.commit(sequence.number, sequence.token_ids, sequence.num_computed_tokens)
            if row.samples:
                self.shares.serve(sequence)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Finish a sequence and take back what it holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._blocks.free(sequence.number)
        else:
            self.waiting.remove(sequence)
        sequence.finish(reason)

    # Those that run

    def _continue(self, draft: Draft) -> None:
        running = self.running
        if (
            self._cache.settling or self._ahead
        ):  # whose rows are being moved, or aren't there yet, has a pause
            running = [s for s in running if self._room.has(s.needed_ids, draft)]
        decodes, prompts = in_turn(running, self.limits.max_step_context)
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

    def _advance(self, sequences: list[Sequence], draft: Draft) -> None:
        for sequence in sequences:
            if draft.full:
                return
            if sequence.status is SequenceStatus.RUNNING and self._secure(sequence, draft):
                self._compute(sequence, draft)

    def _compute(self, sequence: Sequence, draft: Draft) -> None:
        draft.add(sequence)
        sequence.last_step = self._steps

    def _secure(self, sequence: Sequence, draft: Draft) -> bool:
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

    def _preempt(self, sequence: Sequence, draft: Draft) -> None:
        draft.drop(sequence)
        self._blocks.free(sequence.number)
        self.running.remove(sequence)
        sequence.preempt()
        self.waiting.put_back(sequence)
        draft.preempted.append(sequence)

    # Those that wait

    def _firsts(self, origins: Iterable[str]) -> Iterator[Sequence]:
        return (first for first in map(self.waiting.first, origins) if first is not None)

    def _admit(self, turns: Iterator[str], draft: Draft, now: float) -> list[str]:
        """Let lines begin something in turn, again and again, as long as there is room; return those looked at."""
        in_use = self.in_use()
        seen: list[str] = []
        again: Iterable[str] = turns
        while again:
            begun: list[str] = []
            for origin in again:
                seen.append(origin)
                sequence = self.waiting.first(origin)
                if draft.full:
                    return seen
                if sequence is None:
                    continue
                if not self._room.lets_begin(sequence, in_use, draft):
                    self._room.note_blocked(sequence, draft, now)
                    if self._go_ahead(sequence, draft, now):
                        begun.append(origin)
                    continue
                prefix = self._make_room(sequence, draft)
                if prefix is None:
                    return seen
                self._room.take(sequence, in_use, draft)
                self._begin(sequence, prefix, draft, now)
                begun.append(origin)
            again = begun
        return seen

    def _make_room(self, sequence: Sequence, draft: Draft) -> list[int] | None:
        """Return the cached blocks that begin the sequence, once it has room; None if it must wait for that."""
        while True:
            prefix = self._prefix(sequence)
            fits = self._blocks.can_allocate(prefix, len(sequence.token_ids))
            if fits and len(self.running) < self._max_running:
                return prefix
            if any(s.owner.origin == sequence.owner.origin for s in self.running) or not self.running:
                return None
            victim, running = self._victim()
            if (victim.priority, running) <= (sequence.priority, 1):
                return None
            self._preempt(victim, draft)

    def _prefix(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks that begin the sequence. Who waits for room in step after step is looked up once."""
        known: list[int] = []
        if self._found is not None and self._found[:2] == (sequence.number, self._blocks.dropped):
            known = self._found[2]
        scope = sequence.owner.request.cache_scope
        found = self._blocks.match(sequence.stages, sequence.borrowable, scope, known)
        self._found = sequence.number, self._blocks.dropped, found
        return found

    def _begin(self, sequence: Sequence, prefix: list[int], draft: Draft, now: float) -> None:
        live = sequence.owner
        cached = self._blocks.allocate(sequence.number, sequence.stages, prefix, live.request.cache_scope)
        sequence.room = self._blocks.grow(sequence.number, len(sequence.token_ids))
        if sequence.status is SequenceStatus.WAITING:
            self._blocks.count_query(sequence.num_prompt_tokens, cached)
        self.shares.begin(sequence, cached)
        self.waiting.take(live.origin)
        sequence.admit(cached)
        if live.admitted is None:
            live.admitted = now
            draft.admitted.append(live)
        self.running.append(sequence)
        self._compute(sequence, draft)

    # Those that wait for adapters that don't act yet

    def _go_ahead(self, sequence: Sequence, draft: Draft, now: float) -> bool:
        """Begin with what is the base's of a prompt while its adapters are on their way, where there is a place for it.

        It holds no rows yet, so it keeps none from others; false: there is nothing of that to be computed, or no place.
        """
        if not self._room.lets_go_ahead(sequence, len(self._ahead), draft):
            return False
        prefix = self._prefix(sequence)
        if len(prefix) * self._blocks.block_size >= sequence.stages.base_until:
            sequence.goes_ahead = False
            return False
        fits = self._blocks.can_allocate(prefix, len(sequence.token_ids))
        if not fits or len(self.running) >= self._max_running:
            return False
        sequence.goes_ahead = False
        self._ahead.append(sequence)
        self._begin(sequence, prefix, draft, now)
        return True

    def _give_adapters(self, draft: Draft, now: float) -> None:
        """Give those that went ahead their adapters as soon as these can be there.

        Who comes to where they act has a pause until then or, without rows for them, waits as all do who haven't begun:
        blocks are not to be held by who waits for others to end.
        """
        in_use = self.in_use()
        for sequence in [s for s in self._ahead if s.status is SequenceStatus.RUNNING]:
            if self._room.lets_begin(sequence, in_use, draft):
                self._room.take(sequence, in_use, draft)
                continue
            self._room.note_blocked(sequence, draft, now)
            if sequence.needed_ids and draft.head is sequence.owner:
                self._preempt(sequence, draft)
        self._ahead = [
            s for s in self._ahead if s.status is SequenceStatus.RUNNING and not s.owner.holds_adapters
        ]
