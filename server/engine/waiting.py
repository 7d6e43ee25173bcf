"""Sequences that wait, in lines: one for each client's request, however many prompts and choices it has.

Knows whose turn it is. Whether one can begin is the scheduler's to say.
"""

from collections import OrderedDict, deque
from collections.abc import Container, Iterator

from manylora.server.engine.sequence import Sequence


class WaitingQueue:
    """Lines in the order in which they have their turn; a line that had it goes to the end.

    ``len`` and ``num_lines`` may be asked for from any thread.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Sequence]] = OrderedDict()

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
        """Return the lines in the order of their turns: those of which nothing is ``running`` before the others."""
        served = [origin for origin in self._lines if origin in running]
        return [origin for origin in self._lines if origin not in running] + served

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence at the end of its line; a new line is the last. Choices of what has begun pass what hasn't.

        They hold adapters that those behind them may need, and the prompt is still in the prefix cache.
        """
        line = self._lines.setdefault(sequence.owner.origin, deque())
        place = len(line)
        if sequence.owner.admitted is not None:
            place = next((i for i, each in enumerate(line) if each.owner.admitted is None), place)
        line.insert(place, sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that ran already: first of its line, and its line first."""
        origin = sequence.owner.origin
        self._lines.setdefault(origin, deque()).appendleft(sequence)
        self._lines.move_to_end(origin, last=False)

    def take(self, origin: str) -> Sequence:
        """Remove the first of a line; the line has had its turn."""
        line = self._lines[origin]
        sequence = line.popleft()
        self._lines.move_to_end(origin)
        if not line:
            del self._lines[origin]
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that will not begin; its line keeps its place."""
        line = self._lines[sequence.owner.origin]
        line.remove(sequence)
        if not line:
            del self._lines[sequence.owner.origin]
