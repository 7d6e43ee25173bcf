"""`python -m manylora.loadtest.checks.bars.hostile.attack`: the hostile clients, a process at low priority.

Their work must not be taken for the server's, nor delay those who measure. Writes one line of JSON per exchange.
"""

import argparse
import asyncio
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from manylora.loadtest.checks.bars.hostile.exchange import HUNG, perform, to_json
from manylora.loadtest.checks.bars.hostile.kind import Plan
from manylora.loadtest.checks.bars.hostile.kinds import plans
from manylora.loadtest.checks.bars.hostile.streams import address

NICENESS = 10
GIVE_UP = 40
"""Exchanges that got no answer in time, after which the server is taken for dead."""


class Attack:
    """Some clients that work off one list of plans."""

    def __init__(self, url: str, limit: float, out: TextIO) -> None:
        self._host, self._port = address(url)
        self._limit = limit
        self._out = out
        self._hung = 0

    async def run(self, todo: Iterator[tuple[str, Plan]], clients: int) -> None:
        """Perform all plans, ``clients`` at a time."""
        await asyncio.gather(*(self._client(todo) for _ in range(clients)))

    async def _client(self, todo: Iterator[tuple[str, Plan]]) -> None:
        for kind, plan in todo:
            if self._hung >= GIVE_UP:
                return
            for stage in plan:
                outcomes = await asyncio.gather(
                    *(perform(exchange, self._host, self._port, self._limit) for exchange in stage)
                )
                for exchange, outcome in zip(stage, outcomes, strict=True):
                    self._hung += outcome.status == HUNG
                    awaited = exchange.leave_after is None
                    self._out.write(json.dumps({"kind": kind, "awaited": awaited, **to_json(outcome)}) + "\n")


def main() -> None:
    """Attack until the plans are done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("adapters", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", required=True)
    for option, default in (("requests", 100), ("seed", 1), ("clients", 16)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--kinds", nargs="*", default=[], help="only these")
    options = parser.parse_args()
    os.nice(NICENESS)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hostile = tuple(sorted(path.name for path in options.adapters.iterdir()))
    todo = plans(options.seed, options.requests, tuple(options.models), hostile, tuple(options.kinds))
    with options.out.open("w", buffering=1) as out:
        asyncio.run(Attack(options.url, options.limit, out).run(todo, options.clients))


if __name__ == "__main__":
    main()
