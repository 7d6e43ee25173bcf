"""Bar of mixtures: exact beside everything else, and nothing lost in a random walk over what can happen to them."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from manylora.loadtest.checks.bars.mixture_walk import Diverged, Walk
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.checks.bars.walk_house import opened
from manylora.loadtest.checks.mixture_exactness import MIXTURES, check_mixtures
from manylora.server.kernels.choose import PLAIN


@dataclass(frozen=True, slots=True)
class MixtureSize:
    """How much is done."""

    operations: int = 5000
    seed: int = 1


SMALL = MixtureSize(operations=200)


async def mixtures(directory: Path, size: MixtureSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    title = f"7. Mixtures: {MIXTURES} of 2 to 8 adapters beside adapters and the base, kernels: {kernels}"
    report = Report(title)
    if kernels == PLAIN:
        for outcome in check_mixtures(directory / "by hand", torch.device("cpu")):
            report.check(outcome.name, outcome.detail, outcome.passed)
    await _walk(report, directory / "walk", size, kernels)
    return report


async def _walk(report: Report, directory: Path, size: MixtureSize, kernels: str) -> None:
    # The engine tells of each fault that was put in, with where it happened.
    told = logging.getLogger("manylora.server.engine")
    level = told.level
    told.setLevel(logging.CRITICAL)
    try:
        async with opened(directory, kernels) as house:
            walk = Walk(house, random.Random(size.seed))
            try:
                await walk.go(size.operations)
                report.check(_promise(size), "none", True)
            except (Diverged, AssertionError, TimeoutError) as error:
                report.check(_promise(size), f"{type(error).__name__}: {error}", False)
            counts = ", ".join(f"{count} {what}" for what, count in sorted(walk.counts.items()))
            report.note(f"{counts}; {house.faults.count} faults in steps, copies, moves and reads")
    finally:
        told.setLevel(level)


def _promise(size: MixtureSize) -> str:
    return (
        f"{size.operations} random operations (seed {size.seed}): no divergence from the model, no leak, no text of "
        "another mixture"
    )
