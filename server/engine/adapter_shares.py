"""How much of the server each adapter has had: virtual token counters (Sheng et al. 2024, arXiv 2401.00588).

Whoever was served least begins first, so an adapter that many ask for doesn't push out those that few ask for. A prompt
token that is computed counts once, a generated one twice, as it takes about twice the time in a step; both are divided
by the adapter's weight. The base is one among the adapters, and so is a mixture of the same ones, whatever its weights.

Counters are of a group: tenants have turns among themselves, and so have priorities, before any adapter has.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from manylora.server.engine.sequence import Account, Group, Sequence, SequenceStatus

PROMPT_COST, OUTPUT_COST = 1, 2
"""What a token counts."""
KEPT = 1024
"""Counters of a group that are kept before those that say nothing any more are dropped."""


@dataclass(slots=True)
class _Counters:
    served: dict[Account, float] = field(default_factory=dict)
    waiting: Counter[Account] = field(default_factory=Counter)
    """Sequences of each that wait."""
    floor: float = 0.0
    """What the least served of those who waited had when the last one began: who waits for nothing saves nothing up."""

    def least(self) -> float:
        """Return what whoever comes now is taken to have been served at least."""
        return max(self.floor, min((self.served[each] for each in self.waiting), default=0.0))


class AdapterShares:
    """Counters of all adapters that are asked for. What waits is told by the queue, what is served by the scheduler."""

    def __init__(self) -> None:
        self._groups: dict[Group, _Counters] = {}

    def arrive(self, sequence: Sequence) -> None:
        """Note that a sequence waits."""
        counters = self._groups.setdefault(sequence.group, _Counters())
        account = sequence.account
        if account not in counters.waiting:
            counters.served[account] = max(counters.served.get(account, 0.0), counters.least())
        counters.waiting[account] += 1

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence waits no more."""
        counters, account = self._groups[sequence.group], sequence.account
        counters.waiting[account] -= 1
        if not counters.waiting[account]:
            del counters.waiting[account]
            self._prune(counters)

    def begin(self, sequence: Sequence, cached: int) -> None:
        """Note that a waiting sequence begins, of whose prompt so many tokens are cached: it has had its turn."""
        counters, account = self._groups[sequence.group], sequence.account
        counters.floor = counters.least()
        counters.served[account] += price_of(sequence, cached)

    def serve(self, sequence: Sequence) -> None:
        """Note that a sequence was given a token."""
        counters = self._groups.setdefault(sequence.group, _Counters())
        account = sequence.account
        had = counters.served.get(account, counters.floor)
        counters.served[account] = had + OUTPUT_COST / sequence.owner.request.share

    def served(self, sequence: Sequence) -> float:
        """Return what the sequence's adapters were served in its group, divided by their weight."""
        counters = self._groups.get(sequence.group, _Counters())
        return counters.served.get(sequence.account, counters.floor)

    def in_order(self, firsts: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yield sequences of one group: the one whose adapters were served least, as if all before it had begun.

        Who gave up its place has had its turn and goes before them. Those of the same adapters, and those that were
        served the same, stay in their order.
        """
        lines: dict[Account, deque[Sequence]] = {}
        for sequence in firsts:
            if sequence.status is SequenceStatus.PREEMPTED:
                yield sequence
            else:
                lines.setdefault(sequence.account, deque()).append(sequence)
        heap = [(self.served(line[0]), place, line) for place, line in enumerate(lines.values())]
        heapq.heapify(heap)
        while heap:
            served, place, line = heap[0]
            sequence = line.popleft()
            if line:
                heapq.heapreplace(heap, (served + price_of(sequence), place, line))
            else:
                heapq.heappop(heap)
            yield sequence

    def _prune(self, counters: _Counters) -> None:
        """Drop counters that say nothing: whoever comes is taken to have been served as much."""
        if len(counters.served) > KEPT:
            least = counters.least()
            kept = {a: s for a, s in counters.served.items() if a in counters.waiting or s > least}
            counters.served = kept
        if len(self._groups) > KEPT:
            self._groups = {group: each for group, each in self._groups.items() if each.waiting}


def price_of(sequence: Sequence, cached: int = 0) -> float:
    """Return what beginning costs: what is to be computed of the prompt, once."""
    if sequence.status is SequenceStatus.PREEMPTED:
        return 0.0
    return PROMPT_COST * (sequence.num_prompt_tokens - cached) / sequence.owner.request.share
