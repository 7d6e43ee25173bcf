"""Adapters' lives, at random: `python -m manylora.loadtest.checks.adapter_life [--operations 10000] [--kills 200]`.

Registrations, replacements, going back, canaries, mixtures and deletions against a model of what must be so, with
requests all the while: on an engine in this process, where every statement, file and call may fail, callers leave, and
what is killed goes on from its disk; then on a server of its own, which is killed in the middle of changes. Exit status
1 at the first divergence, leak, mixed answer, or loss of what was acknowledged.
"""

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from manylora.loadtest.checks.bars.material import kernels_option
from manylora.loadtest.checks.bars.walk_house import make_rig
from manylora.loadtest.checks.life.chaos import frail_databases, frail_files
from manylora.loadtest.checks.life.house import House
from manylora.loadtest.checks.life.kills import kill_servers
from manylora.loadtest.checks.life.truth import Diverged, Truth
from manylora.loadtest.checks.life.walk import Walk
from manylora.server.kernels.choose import PLAIN

KEEP = 2


async def walk(directory: Path, operations: int, seed: int, kernels: str = PLAIN) -> Counter[str]:
    """Do so many operations on an engine here; return how often what was done. Raises Diverged."""
    home = directory / "home"
    home.mkdir(parents=True)
    house = House(make_rig(directory, kernels), home, KEEP)
    with frail_databases(house.chaos), frail_files(home, house.chaos):
        await house.open()
        done = Walk(house, random.Random(seed), Truth(KEEP))
        try:
            await done.go(operations)
        finally:
            house.chaos.disarm()
            await house.close()
    return done.counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kernels", type=kernels_option, default=PLAIN)
    given = parser.parse_args(arguments)
    logging.disable(logging.ERROR)  # the faults that are put in
    with tempfile.TemporaryDirectory() as room:
        try:
            began = time.monotonic()
            counts = asyncio.run(walk(Path(room) / "walk", given.operations, given.seed, given.kernels))
            _tell(f"{given.operations} operations", counts, began)
            began = time.monotonic()
            _tell(f"{given.kills} kills", kill_servers(Path(room) / "kills", given.kills, given.seed), began)
        except Diverged as error:
            sys.stdout.write(f"diverged: {error}\n")
            return 1
    return 0


def _tell(what: str, counts: Counter[str], began: float) -> None:
    said = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
    sys.stdout.write(f"{what} in {time.monotonic() - began:.0f} s, nothing diverged: {said}\n")


if __name__ == "__main__":
    sys.exit(main())
