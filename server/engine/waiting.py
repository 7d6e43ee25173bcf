"""Sequences that wait, in lines: one for each client's request, however many prompts and choices it has.

Knows whose turn it is: the more urgent before the others; of these, those of which nothing runs; and of these, tenants
by their weights (start-time fair queueing, Goyal et al. 1996, a turn being a sequence that begins), however many lines
each has. Whether one can begin is the scheduler's to say.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Container, Iterator

from manylora.server.engine.sequence import Sequence, SequenceStatus


class WaitingQueue:
    """Lines in the order in which they have their turn; a line that had it goes to the end.

    ``len`` and ``num_lines`` may be asked for from any thread.
    """

    def __init__(self) -> None:
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

    def turns(self, running: Container[str]) -> list[str]:
        """Return the lines in the order of their turns; of ``running`` ones something runs."""
        classes: dict[tuple[int, bool], list[str]] = {}
        for origin, line in self._lines.items():
            classes.setdefault((line[0].priority, origin in running), []).append(origin)
        order = (lambda origins: origins) if len(self._tenants) == 1 else self._by_weight
        return [origin for key in sorted(classes) for origin in order(classes[key])]

    def _by_weight(self, origins: list[str]) -> list[str]:
        begins: dict[str, float] = {}
        due: list[float] = []
        for origin in origins:
            first = self._lines[origin][0]
            tenant = first.owner.request.tenant
            begin = begins.get(tenant, max(self._now, self._next.get(tenant, 0.0)))
            begins[tenant] = begin + _price(first)
            due.append(begin)
        return [origins[place] for place in sorted(range(len(origins)), key=due.__getitem__)]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence at the end of its line; a new line is the last. Choices of what has begun pass what hasn't.

        They hold adapters that those behind them may need, and the prompt is still in the prefix cache.
        """
        line = self._line_of(sequence)
        place = len(line)
        if sequence.owner.admitted is not None:
            place = next((i for i, each in enumerate(line) if each.owner.admitted is None), place)
        line.insert(place, sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that ran already: first of its line, and its line first."""
        origin = sequence.owner.origin
        self._line_of(sequence).appendleft(sequence)
        self._lines.move_to_end(origin, last=False)

    def take(self, origin: str) -> Sequence:
        """Remove the first of a line, which is about to run; the line has had its turn, and so has its tenant."""
        line = self._lines[origin]
        sequence = line.popleft()
        self._lines.move_to_end(origin)
        self._note_turn(sequence)
        if not line:
            self._drop(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that will not begin; its line keeps its place."""
        line = self._lines[sequence.owner.origin]
        line.remove(sequence)
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
