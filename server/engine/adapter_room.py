"""Whether the adapters of a waiting request let it begin: who gets arena rows, who passes whom, what is read ahead.

Rows are given out in the order of turns: the first request that finds none blocks all who need some. Users of adapters
on the device pass it a bounded number of times. Decides; the cache keeps the books and the engine copies.
"""

from collections.abc import Iterable
from itertools import islice

from manylora.server.engine.adapter_cache import AdapterCache, Placement
from manylora.server.engine.sequence import Sequence
from manylora.server.engine.step_plan import Draft, SchedulerLimits

_READ_AHEAD = 4
"""Lines, in the order of their turns, whose first one's adapters are read from disk and kept on the host."""
_LOOK_AHEAD = 64
"""Lines that are looked through for those, in every step: the order of each costs some microseconds."""


class AdapterRoom:
    """Gives arena rows to those whose turn it is."""

    def __init__(self, limits: SchedulerLimits, cache: AdapterCache) -> None:
        self._limits = limits
        self._cache = cache

    def lets_begin(self, sequence: Sequence, in_use: set[int], draft: Draft) -> bool:
        """Say whether the sequence's adapters are on the device, or can be put there before this step.

        If they can, but not so soon, they are given their rows now, and it begins once those are filled.
        """
        ids = sequence.adapter_ids
        if not ids:
            return True
        if self._cache.resident(ids):
            head = draft.head
            patience_over = head is not None and head.overtaken >= self._limits.max_overtakes
            return sequence.owner.holds_adapters or not (patience_over and self._cache.evictable(ids))
        if self.has(ids, draft):
            return True
        if self._cache.settling and not self._cache.at_once:
            return False  # what is being placed takes all that may be changed; whether there is room is asked later
        placement = Placement.NO_ROOM if draft.head is not None else self._cache.can_place(ids, in_use)
        if placement is Placement.LOADABLE:
            return True
        if placement is Placement.IN_PIECES and not self._cache.settling:
            self._place(sequence, in_use, draft)
            draft.in_pieces = True
        if placement is Placement.NO_ROOM and draft.head is None:
            draft.head = sequence.owner
        return False

    def has(self, adapter_ids: Iterable[int], draft: Draft) -> bool:
        """Say whether all are on the device, or will be before this step."""
        return all(i in draft.filled or self._cache.resident({i}) for i in adapter_ids)

    def lets_go_ahead(self, sequence: Sequence, ahead: int, draft: Draft) -> bool:
        """Say whether one whose adapters aren't there may begin with what is the base's of its prompt.

        ``ahead``: how many have done so. Nobody passes who finds no rows: that one's turn comes first.
        """
        return sequence.goes_ahead and ahead < _READ_AHEAD and draft.head is None

    def note_blocked(self, sequence: Sequence, draft: Draft, now: float) -> None:
        """Note that it waits for its adapters; once for too long, its request is over."""
        live = sequence.owner
        if live.blocked_since is None:
            live.blocked_since = now
        elif now - live.blocked_since >= self._limits.adapter_timeout and not live.holds_adapters:
            draft.expired.append(live)

    def take(self, sequence: Sequence, in_use: set[int], draft: Draft) -> None:
        """Give the adapters of a sequence that begins their rows; ask ``lets_begin`` first."""
        ids = sequence.adapter_ids
        sequence.owner.holds_adapters, sequence.owner.blocked_since = True, None
        if not self._cache.resident(ids):
            self._place(sequence, in_use, draft)
            draft.filled |= ids
            return
        if draft.head is not None and self._cache.evictable(ids):
            draft.head.overtaken += 1
        self._cache.touch(ids)
        in_use |= ids

    def _place(self, sequence: Sequence, in_use: set[int], draft: Draft) -> None:
        draft.changes += self._cache.place(sequence.adapter_ids, in_use)
        self._cache.touch(sequence.adapter_ids)
        in_use |= sequence.adapter_ids

    def read_ahead(self, waiting: Iterable[Sequence]) -> frozenset[int]:
        """Return the adapters of the first that wait for theirs: to be read, and kept on the host."""
        wanted: set[int] = set()
        found = 0
        for sequence in islice(waiting, _LOOK_AHEAD):
            if not self._cache.resident(sequence.adapter_ids):
                wanted |= sequence.adapter_ids
                found += 1
                if found == _READ_AHEAD:
                    break
        return frozenset(wanted)
