"""`python -m manylora.loadtest.checks.bars NAME`: run one bar or all, print what was promised and what was measured."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from manylora.loadtest.checks.bars import (
    hangups,
    kinds,
    mixtures,
    neighbours,
    swap,
    thousand,
)
from manylora.loadtest.checks.bars.hostile import bar as hostile
from manylora.loadtest.checks.bars.material import kernels_option
from manylora.loadtest.checks.bars.report import Report
from manylora.server.kernels.choose import PLAIN

Bar = Callable[[Path, bool, str], Awaitable[Report]]
"""Where it may write, whether it is small, and what its servers compute with: see material.level_of."""
BARS: dict[str, Bar] = {
    "kinds": lambda where, small, kernels: kinds.kinds(
        where, kinds.SMALL if small else kinds.KindsSize(), kernels
    ),
    "swap": lambda where, small, kernels: swap.swap(where, swap.SMALL if small else swap.SwapSize(), kernels),
    "thousand": lambda where, small, kernels: thousand.thousand(
        where, thousand.SMALL if small else thousand.ThousandSize(), kernels
    ),
    "neighbours": lambda where, small, kernels: neighbours.neighbours(
        where, neighbours.SMALL if small else neighbours.NeighboursSize(), kernels
    ),
    "hangups": lambda where, small, kernels: hangups.hangups(
        where, hangups.SMALL if small else hangups.HangupSize(), kernels
    ),
    "mixtures": lambda where, small, kernels: mixtures.mixtures(
        where, mixtures.SMALL if small else mixtures.MixtureSize(), kernels
    ),
    "hostile": lambda where, small, kernels: hostile.hostile(
        where, hostile.SMALL if small else hostile.HostileSize(), kernels
    ),
}


def main() -> int:
    """Run the bars; 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.checks.bars", description=__doc__)
    parser.add_argument("bar", choices=[*BARS, "all"])
    parser.add_argument("--small", action="store_true", help="the size that the test suite runs")
    parser.add_argument(
        "--kernels", type=kernels_option, default=PLAIN, help="of the servers: plain, auto, or a native level"
    )
    parser.add_argument("--requests", type=int, help="hostile only: how many")
    parser.add_argument("--seed", type=int, help="hostile only: of the requests")
    parser.add_argument("--clients", type=int, help="hostile only: at a time")
    parser.add_argument("--kinds", nargs="+", help="hostile only: just these, for example 'template bombs'")
    options = parser.parse_args()
    bars = {**BARS, "hostile": _hostile(options)}
    console = Console(width=140)
    passed = True
    for name in BARS if options.bar == "all" else [options.bar]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"bar-{name}-") as scratch:
            report = asyncio.run(_run(bars[name], Path(scratch), options.small, options.kernels))
        report.note(f"took {time.monotonic() - began:.0f} s")
        report.print(console)
        passed = passed and report.passed
    return 0 if passed else 1


def _hostile(options: argparse.Namespace) -> Bar:
    """Return the hostile bar with what the command line changes of its size."""
    names = ("requests", "seed", "clients")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.kinds:
        changes["kinds"] = tuple(options.kinds)

    async def run(where: Path, small: bool, kernels: str) -> Report:
        size = hostile.SMALL if small else hostile.HostileSize()
        return await hostile.hostile(where, replace(size, **changes), kernels)

    return run


async def _run(bar: Bar, scratch: Path, small: bool, kernels: str) -> Report:
    return await bar(scratch, small, kernels)


if __name__ == "__main__":
    sys.exit(main())
