"""How much was used in the last minute: a sliding window of one-second slots. Knows no clock of its own."""

import math
from collections import deque
from dataclasses import dataclass

SECONDS = 60
"""In no span of so many seconds is more taken than the limit."""


@dataclass(slots=True, eq=False)
class Slot:
    """What was taken in one second."""

    second: int
    amount: int = 0


class SlidingWindow:
    """A limit of ``limit``, which may become another, in any SECONDS. Times are seconds of a clock that only goes on.

    A second's amount is free again when all of it is SECONDS ago: up to a second late, never early.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._slots: deque[Slot] = deque()
        self._used = 0

    def remaining(self, now: float) -> int:
        """Return what may be taken now."""
        self._forget(now)
        return max(0, self.limit - self._used)

    def wait(self, amount: int, now: float) -> float:
        """Return after how many seconds ``amount`` may be taken, 0: now; infinity: never, it is over the limit."""
        if amount > self.limit:
            return math.inf
        self._forget(now)
        lacking = amount + self._used - self.limit
        for slot in self._slots:
            if lacking <= 0:
                break
            lacking -= slot.amount
            if lacking <= 0:
                return self._free_at(slot) - now
        return 0.0

    def take(self, amount: int, now: float) -> Slot:
        """Use ``amount``; ask ``wait`` first. Return where it is noted, for ``settle``."""
        self._forget(now)
        second = math.floor(now)
        if not self._slots or self._slots[-1].second != second:
            self._slots.append(Slot(second))
        self._slots[-1].amount += amount
        self._used += amount
        return self._slots[-1]

    def settle(self, slot: Slot, taken: int, used: int) -> None:
        """Have ``used`` stand where ``taken`` was; of a second that is long over nothing is left to change."""
        if slot in self._slots:
            slot.amount += used - taken
            self._used += used - taken

    def reset(self, now: float) -> float:
        """Return after how many seconds everything may be taken again."""
        self._forget(now)
        return max((self._free_at(slot) - now for slot in self._slots if slot.amount), default=0.0)

    @staticmethod
    def _free_at(slot: Slot) -> float:
        return slot.second + 1.0 + SECONDS

    def _forget(self, now: float) -> None:
        while self._slots and self._free_at(self._slots[0]) <= now:
            self._used -= self._slots.popleft().amount
