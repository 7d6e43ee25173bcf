"""Sequences that wait, in lines: one for each client's request, however many prompts and choices it has.

Knows whose turn it is: the more urgent before the others; of these, those of which nothing runs; and of these, tenants
by their weights (start-time fair queueing, Goyal et al. 1996, a turn being a sequence that begins), however many lines
each has; and of a tenant's, those whose adapters were served least. Whether one can begin is the scheduler's to say.
"""

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Container, Iterator

from manylora.server.engine.adapter_shares import AdapterShares
from manylora.server.engine.sequence import Sequence, SequenceStatus


class WaitingQueue:
    """Lines in the order in which they have their turn; a line that had it goes to the end.

    ``len`` and ``num_lines`` may be asked for from any thread.
    """

    def __init__(self, shares: AdapterShares) -> None:
        """``shares`` hears who waits, and says whose adapters were served least."""
        self._shares = shares
        self._lines: OrderedDict[str, deque[Sequence]] = OrderedDict()
        self._tenants: Counter[str] = Counter()
        """Lines of each tenant that has one."""
        self._now = 0.0
        """Turns that a tenant of weight 1 would have had that always waited."""
        self._next: dict[str, float] = {}
        """When by that clock a tenant's next turn is; who isn't here has it now."""

    def __len__(self) -> int:
        return sum(len(line) for line in list(self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line)

    @property
    def num_lines(self) -> int:
        """How many clients' requests have something that waits."""
        return len(self._lines)

    def firsts(self) -> Iterator[Sequence]:
        """Return the first of each line, in order."""
        return (line[0] for line in self._lines.values())

    def first(self, origin: str) -> Sequence | None:
        """Return the first of one line."""
        line = self._lines.get(origin)
        return line[0] if line else None

    def turns(self, running: Container[str]) -> Iterator[str]:
        """Yield the lines of now in the order of their turns; of ``running`` ones something runs.

        What begins meanwhile changes nothing of the order.
        """
        classes: dict[tuple[int, bool], dict[str, list[Sequence]]] = {}
        for origin, line in self._lines.items():
            first = line[0]
            tenants = classes.setdefault((first.priority, origin in running), {})
            tenants.setdefault(first.owner.request.tenant, []).append(first)
        begins = {tenant: max(self._now, self._next.get(tenant, 0.0)) for tenant in self._tenants}
        return self._in_order(classes, begins)

    def _in_order(
        self, classes: dict[tuple[int, bool], dict[str, list[Sequence]]], begins: dict[str, float]
    ) -> Iterator[str]:
        for key in sorted(classes):
            lines = {tenant: self._shares.in_order(firsts) for tenant, firsts in classes[key].items()}
            due = [(begins[tenant], place, tenant) for place, tenant in enumerate(lines)]
            heapq.heapify(due)
            while due:
                begin, place, tenant = due[0]
                first = next(lines[tenant], None)
                if first is None:
                    heapq.heappop(due)
                    continue
                heapq.heapreplace(due, (begin + _price(first), place, tenant))
                yield first.owner.origin

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence at the end of its line; a new line is the last. Choices of what has begun pass what hasn't.

        They hold adapters that those behind them may need, and the prompt is still in the prefix cache.
        """
        line = self._line_of(sequence)
        place = len(line)
        if sequence.owner.admitted is not None:
            place = next((i for i, each in enumerate(line) if each.owner.admitted is None), place)
        line.insert(place, sequence)
        self._shares.arrive(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that ran already: first of its line, and its line first."""
        origin = sequence.owner.origin
        self._line_of(sequence).appendleft(sequence)
        self._shares.arrive(sequence)
        self._lines.move_to_end(origin, last=False)

    def take(self, origin: str) -> Sequence:
        """Remove the first of a line, which is about to run; the line has had its turn, and so has its tenant."""
        line = self._lines[origin]
        sequence = line.popleft()
        self._lines.move_to_end(origin)
        self._note_turn(sequence)
        self._shares.leave(sequence)
        if not line:
            self._drop(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that will not begin; its line keeps its place."""
        line = self._lines[sequence.owner.origin]
        line.remove(sequence)
        self._shares.leave(sequence)
        if not line:
            self._drop(sequence)

    def _line_of(self, sequence: Sequence) -> deque[Sequence]:
        """Return the sequence's line, made if need be."""
        origin = sequence.owner.origin
        if origin not in self._lines:
            self._lines[origin] = deque()
            self._tenants[sequence.owner.request.tenant] += 1
        return self._lines[origin]

    def _drop(self, sequence: Sequence) -> None:
        tenant = sequence.owner.request.tenant
        del self._lines[sequence.owner.origin]
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        if not self._tenants:  # nobody is owed a turn
            self._now, self._next = 0.0, {}

    def _note_turn(self, sequence: Sequence) -> None:
        price, tenant = _price(sequence), sequence.owner.request.tenant
        if not price:
            return
        begin = max(self._now, self._next.get(tenant, 0.0))
        self._next[tenant] = begin + price
        self._now = begin  # who hasn't waited since then has saved no turns up


def _price(sequence: Sequence) -> float:
    """Return how long its tenant has no further turn once the sequence has begun; what ran already has had its own."""
    return 0.0 if sequence.status is SequenceStatus.PREEMPTED else 1 / sequence.owner.request.weight
