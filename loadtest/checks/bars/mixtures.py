"""Bar of mixtures: exact beside everything else, and nothing lost in a random walk over what can happen to them."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from manylora.adapters.mixtures import MixturePart, spell
from manylora.loadtest.checks.bars.exact import (
    ADAPTERS,
    ExactSize,
    ask_both_ways,
    describe,
    hold_near,
    make_asks,
)
from manylora.loadtest.checks.bars.material import Material
from manylora.loadtest.checks.bars.mixture_walk import Diverged, Walk
from manylora.loadtest.checks.bars.reference import Reference, agrees
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.checks.bars.walk_house import opened
from manylora.loadtest.checks.mixture_exactness import MIXTURES, check_mixtures, draw_mixtures
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask
from manylora.server.kernels.choose import PLAIN


@dataclass(frozen=True, slots=True)
class MixtureSize:
    """How much is done."""

    asks: ExactSize = field(default_factory=lambda: ExactSize(requests=75))
    """To the base, eight adapters and sixteen mixtures in turn."""
    operations: int = 5000
    seed: int = 1


SMALL = MixtureSize(ExactSize(requests=25, max_tokens=12, spread_seconds=0.5), operations=200)


async def mixtures(directory: Path, size: MixtureSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    title = f"7. Mixtures: {MIXTURES} of 2 to 8 adapters beside adapters and the base, kernels: {kernels}"
    report = Report(title)
    if kernels == PLAIN:
        for outcome in check_mixtures(directory / "by hand", torch.device("cpu")):
            report.check(outcome.name, outcome.detail, outcome.passed)
    await _over_http(report, Material.make(directory / "http", kernels), size.asks)
    await _walk(report, directory / "walk", size, kernels)
    return report


async def _over_http(report: Report, material: Material, size: ExactSize) -> None:
    sources = {f"adapter{number}": source for number, source in enumerate(material.mixed(ADAPTERS))}
    mixed = {
        spell([MixturePart(f"adapter{number}", weight) for number, weight in parts]): [
            (f"adapter{number}", weight) for number, weight in parts
        ]
        for parts in draw_mixtures(MIXTURES, ADAPTERS, seed=9)
    }
    asks = make_asks([material.base.name, *sources, *mixed], size)
    paths = {name: material.adapters / source for name, source in sources.items()}
    reference = Reference(material.base, paths, mixed)
    where = material.base.parent
    ways = await ask_both_ways(where, material, sources, asks, size, "none", reference)
    for kind, answers in (("in one batch", ways.mixed), ("again, prefixes cached", ways.warm)):
        good = [one.same_as(other) for one, other in zip(ways.alone, answers, strict=True)]
        report.share(
            f"over HTTP, {kind}: bit for bit those alone",
            sum(good),
            len(asks),
            _wrong(asks, ways.alone, answers, good),
        )
    if material.native:
        hold_near(report, "over HTTP: ", asks, ways.distances)
        return
    expected = [reference.answer(ask) for ask in asks]
    good = [agrees(found, right) for found, right in zip(ways.mixed, expected, strict=True)]
    report.share(
        "over HTTP: the tokens are those of peft's cat",
        sum(good),
        len(asks),
        _wrong(asks, expected, ways.mixed, good),
    )


def _wrong(
    asks: Sequence[Ask], right: Sequence[Answer], found: Sequence[Answer], good: Sequence[bool]
) -> list[str]:
    return [
        describe(ask, one, other)
        for ask, one, other, same in zip(asks, right, found, good, strict=True)
        if not same
    ]


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
