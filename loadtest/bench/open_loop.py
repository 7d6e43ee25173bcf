"""An open loop: each request is sent when it is due, whatever became of those before it.

A closed loop asks a slow server less, and so measures it too well ("coordinated omission"). Here an answer's times
count from when its request was due, and how late the client itself was in sending is kept beside them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from manylora.loadtest.bench.workload import Planned
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.summary import Spread

LATE = 0.01
"""Seconds from which a request was sent late."""
MOST_LATE = 0.01
"""Share of late requests from which the client couldn't keep up."""


async def send_when_due(
    plan: Iterable[Planned],
    send: Callable[[Planned], Awaitable[Answer]],
    take: Callable[[Planned, Answer], None],
) -> None:
    """Send every request of ``plan`` at its time, and return when all have ended. Times must not decrease."""
    began = time.perf_counter()

    async def one(planned: Planned, due: float) -> None:
        answer = await send(planned)
        answer.due = due
        take(planned, answer)

    async with asyncio.TaskGroup() as group:
        for planned in plan:
            due = began + (planned.at or 0.0)
            wait = due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            group.create_task(one(planned, due))


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late requests were sent."""

    seconds: Spread
    late: int
    """Requests sent more than LATE after they were due."""

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> "Lateness | None":
        """Sum up; None for a closed loop, in which nothing is due."""
        found = [max(0.0, answer.started - answer.due) for answer in answers if answer.due is not None]
        if not found:
            return None
        return cls(Spread.of(found), sum(each > LATE for each in found))

    @property
    def verdict(self) -> str | None:
        """Why the client is the limit, if it couldn't keep up."""
        if self.late <= MOST_LATE * self.seconds.count:
            return None
        return (
            f"it sent {self.late} of {self.seconds.count} requests over {1000 * LATE:g} ms late "
            f"(p99 {1000 * self.seconds.p99:.1f} ms); ask for fewer a second, or run several clients"
        )

    def to_json(self) -> dict[str, object]:
        """Return the numbers as JSON values."""
        return {"seconds": self.seconds.to_json(), "late": self.late, "late_from_seconds": LATE}
