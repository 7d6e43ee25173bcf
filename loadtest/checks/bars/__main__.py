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

from manylora.loadtest.checks.bars import exact, hangups, mixtures, neighbours, swap, thousand
from manylora.loadtest.checks.bars.hostile import bar as hostile
from manylora.loadtest.checks.bars.report import Report

Bar = Callable[[Path, bool], Awaitable[Report]]
BARS: dict[str, Bar] = {
    "exact": lambda where, small: exact.exact(where, exact.SMALL if small else exact.ExactSize()),
    "swap": lambda where, small: swap.swap(where, swap.SMALL if small else swap.SwapSize()),
    "thousand": lambda where, small: thousand.thousand(
        where, thousand.SMALL if small else thousand.ThousandSize()
    ),
    "neighbours": lambda where, small: neighbours.neighbours(
        where, neighbours.SMALL if small else neighbours.NeighboursSize()
    ),
    "hangups": lambda where, small: hangups.hangups(where, hangups.SMALL if small else hangups.HangupSize()),
    "mixtures": lambda where, small: mixtures.mixtures(
        where, mixtures.SMALL if small else mixtures.MixtureSize()
    ),
    "hostile": lambda where, small: hostile.hostile(where, hostile.SMALL if small else hostile.HostileSize()),
}


def main() -> int:
    """Run the bars; 1 if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m manylora.loadtest.checks.bars", description=__doc__)
    parser.add_argument("bar", choices=[*BARS, "all"])
    parser.add_argument("--small", action="store_true", help="the size that the test suite runs")
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
            report = asyncio.run(_run(bars[name], Path(scratch), options.small))
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

    async def run(where: Path, small: bool) -> Report:
        size = hostile.SMALL if small else hostile.HostileSize()
        return await hostile.hostile(where, replace(size, **changes))

    return run


async def _run(bar: Bar, scratch: Path, small: bool) -> Report:
    return await bar(scratch, small)


if __name__ == "__main__":
    sys.exit(main())
