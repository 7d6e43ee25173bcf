"""How much of the server each adapter has had: virtual token counters (Sheng et al. 2024, arXiv 2401.00588).

Whoever was served least begins first, so an adapter that many ask for doesn't push out those that few ask for. A prompt
token that is computed counts once, a generated one twice, as it takes about twice the time in a step; both are divided
by the adapter's weight. The base is one among the adapters. What a mixture is served counts for each of its parts,
apart from what those are served alone, and the part that has had most says when its turn is: many subsets of a few
adapters are no more than these.

Counters are of a group: tenants have turns among themselves, and so have priorities, before any adapter has.

Whoever comes is taken to have been served as much as the least of those that wait, or what each of them was given
meanwhile if that is more: else newcomers would pass whoever was served more for as long as there are any.
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


Part = tuple[int, bool]
"""Whose counter it is: an adapter's, and whether that of the mixtures that it is in."""
BASE: Part = (-1, False)


def parts_of(account: Account) -> tuple[Part, ...]:
    """Return whose counters go on with what an account is served."""
    mixed = len(account) > 1
    return tuple([(adapter_id, mixed) for adapter_id in account]) or (BASE,)


@dataclass(slots=True)
class _Counters:
    served: dict[Part, float] = field(default_factory=dict)
    waiting: Counter[Account] = field(default_factory=Counter)
    """Sequences of each that wait."""
    floor: float = 0.0
    """A clock: what each of those that wait was given, were all given the same. Who waits for nothing saves nothing."""

    def of(self, account: Account) -> float:
        """Return what an account is taken to have been served."""
        return max([self.served.get(part, self.floor) for part in parts_of(account)])

    def parts_waiting(self) -> set[Part]:
        """Return whose counters say when something that waits has its turn."""
        return {part for account in self.waiting for part in parts_of(account)}

    def least(self) -> float:
        """Return what whoever comes now is taken to have been served at least: no more than all that wait."""
        waiting = [self.of(each) for each in self.waiting]
        return max(min(waiting), min(self.floor, max(waiting))) if waiting else self.floor

    def charge(self, account: Account, price: float) -> None:
        """Note what an account was served. It counts for those that wait, if it is one of them."""
        for part in parts_of(account):
            self.served[part] = self.served.get(part, self.floor) + price
        if account in self.waiting:
            self.floor += price / len(self.waiting)


class AdapterShares:
    """Counters of all adapters that are asked for. What waits is told by the queue, what is served by the scheduler."""

    def __init__(self) -> None:
        self._groups: dict[Group, _Counters] = {}

    def arrive(self, sequence: Sequence) -> None:
        """Note that a sequence waits."""
        counters = self._groups.setdefault(sequence.group, _Counters())
        account = sequence.account
        if account not in counters.waiting:
            least, waiting = counters.least(), counters.parts_waiting() if len(account) > 1 else ()
            for part in parts_of(account):
                if part in waiting:  # it has a turn as it is
                    continue
                counters.served[part] = max(counters.served.get(part, 0.0), least)
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
        counters = self._groups[sequence.group]
        counters.floor = counters.least()
        counters.charge(sequence.account, price_of(sequence, cached))

    def serve(self, sequence: Sequence) -> None:
        """Note that a sequence was given a token."""
        counters = self._groups.setdefault(sequence.group, _Counters())
        counters.charge(sequence.account, OUTPUT_COST / sequence.owner.request.share)

    def served(self, sequence: Sequence) -> float:
        """Return what the sequence's adapters were served in its group, divided by their weight."""
        return self._groups.get(sequence.group, _Counters()).of(sequence.account)

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
        yield from self._by_served(lines)

    def _by_served(self, lines: dict[Account, deque[Sequence]]) -> Iterator[Sequence]:
        counters = next((self._groups.get(line[0].group) for line in lines.values()), None) or _Counters()
        parts = {account: parts_of(account) for account in lines}
        served = {each: counters.served.get(each, counters.floor) for own in parts.values() for each in own}
        heap = [(counters.of(account), place, account) for place, account in enumerate(lines)]
        heapq.heapify(heap)
        while heap:
            told, place, account = heap[0]
            now = max([served[each] for each in parts[account]])
            if now > told:  # other mixtures with its parts came before it
                heapq.heapreplace(heap, (now, place, account))
                continue
            sequence = lines[account].popleft()
            for each in parts[account]:
                served[each] += price_of(sequence)
            if not lines[account]:
                heapq.heappop(heap)
            yield sequence

    def _prune(self, counters: _Counters) -> None:
        """Drop counters that say nothing: whoever comes is taken to have been served as much."""
        if len(counters.served) > KEPT:
            least = counters.least()
            waiting = counters.parts_waiting()
            counters.served = {p: s for p, s in counters.served.items() if p in waiting or s > least}
        if len(self._groups) > KEPT:
            self._groups = {group: each for group, each in self._groups.items() if each.waiting}


def price_of(sequence: Sequence, cached: int = 0) -> float:
    """Return what beginning costs: what is to be computed of the prompt, once."""
    if sequence.status is SequenceStatus.PREEMPTED:
        return 0.0
    return PROMPT_COST * (sequence.num_prompt_tokens - cached) / sequence.owner.request.share
