"""What adapters cost a step: `python -m manylora.loadtest.checks.adapter_costs`. Exit status 1 if a promise is broken.

Two promises. A batch of ranks 8, 16, 32 and 64 costs what their sum costs: what adapters add to its step is, within a
tenth, what they add on average to batches of one of these ranks each. And more streams are always more tokens a second:
with an adapter for each of 1 to 64 streams, tokens a second grow from each size to the next. Steps of all kinds are
taken by turns, so that what else the machine does meets all alike, and the lower quartile of each counts.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manylora.loadtest.material.checkpoints import SHAPES
from manylora.loadtest.material.decode_steps import decode_step, place_adapters
from manylora.loadtest.material.engines import served
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.random_model import QUANTIZATIONS, ModelChoice, build_decoder
from manylora.loadtest.material.text_table import milliseconds, text_table
from manylora.server.kernels.step import StepBatch
from manylora.server.model.served import ServedModel

RANKS = (8, 16, 32, 64)
TOLERANCE = 0.10
SIZES = (1, 2, 4, 8, 16, 32, 64)
BASE, MIXED = "base alone", "mixed"
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a step of each kind."""

    mixed: Mapping[str, float]
    """BASE, "rank 8" and so on, MIXED."""
    distinct: Mapping[int, float]
    """By number of streams, each with an adapter of its own."""

    @property
    def expected(self) -> float:
        """What the mixed batch's adapters are to add: the mean over its ranks."""
        return sum(self.mixed[f"rank {rank}"] - self.mixed[BASE] for rank in RANKS) / len(RANKS)

    @property
    def ratio(self) -> float:
        """What they add by what they are to add; 1 where nothing costs anything."""
        added = self.mixed[MIXED] - self.mixed[BASE]
        return added / self.expected if self.expected > 0 else 1.0

    @property
    def keeps_to_the_sum(self) -> bool:
        """Whether mixed ranks cost what their sum costs."""
        return abs(self.ratio - 1) <= TOLERANCE

    @property
    def grows(self) -> bool:
        """Whether each size gives more tokens a second than the one before."""
        speeds = [size / seconds for size, seconds in sorted(self.distinct.items())]
        return all(after > before for before, after in itertools.pairwise(speeds))

    def text(self) -> str:
        """Return both tables and verdicts."""
        mixed = [
            (name, milliseconds(seconds), milliseconds(seconds - self.mixed[BASE]))
            for name, seconds in self.mixed.items()
        ]
        distinct = [
            (str(size), milliseconds(seconds), f"{size / seconds:.1f}")
            for size, seconds in sorted(self.distinct.items())
        ]
        kept = "pass" if self.keeps_to_the_sum else "FAIL"
        grows = "pass" if self.grows else "FAIL"
        return "\n".join(
            [
                text_table(("adapters", "step, ms", "of it adapters"), mixed),
                f"{kept}: mixed ranks cost {self.ratio:.2f} × what their sum costs (bar: 1 ± {TOLERANCE:g})",
                "",
                text_table(("streams, each its own", "step, ms", "tokens/s"), distinct),
                f"{grows}: more streams give more tokens a second",
            ]
        )


def quartile(values: Sequence[float]) -> float:
    """Return the lower quartile."""
    return sorted(values)[len(values) // 4]


def by_turns(model: ServedModel, steps: Mapping[str, StepBatch], rounds: int) -> dict[str, float]:
    """Run every step in each round; return the lower quartile of each one's seconds."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + WARM_UP):
        for name, step in steps.items():
            began = time.perf_counter()
            logits = model(step).logits
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            if number >= WARM_UP:
                taken[name].append(time.perf_counter() - began)
    return {name: quartile(times) for name, times in taken.items()}


def measure(choice: ModelChoice, each: int, sizes: Sequence[int], context: int, rounds: int) -> Costs:
    """Measure both. ``each``: rows of each rank in the mixed batch, which has len(RANKS) times as many."""
    rows = each * len(RANKS)
    most = max(rows, *sizes)
    # As many adapters of each rank as a batch of that rank alone takes, and those of the sizes.
    decoder = build_decoder(choice)
    model = served(decoder, most, context, sum(RANKS) * rows)
    placed = place_adapters(model, [rank for rank in RANKS for _ in range(rows)])
    by_rank = {rank: placed[number * rows : (number + 1) * rows] for number, rank in enumerate(RANKS)}
    steps = {BASE: decode_step(model, rows, context, [])}
    steps |= {f"rank {rank}": decode_step(model, rows, context, by_rank[rank]) for rank in RANKS}
    steps[MIXED] = decode_step(
        model, rows, context, [by_rank[rank][row] for row in range(each) for rank in RANKS]
    )
    mixed = by_turns(model, steps, rounds)
    own = served(decoder, max(sizes), context, 16 * max(sizes))
    adapters = place_adapters(own, [16] * max(sizes))
    distinct = {str(size): decode_step(own, size, context, adapters[:size]) for size in sizes}
    return Costs(mixed, {int(size): seconds for size, seconds in by_turns(own, distinct, rounds).items()})


def main() -> None:
    """Print both tables, and say by the exit status whether both promises are kept."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.adapter_costs", description=__doc__
    )
    parser.add_argument("--model", default="qwen2.5-0.5b", help=f"{', '.join(SHAPES)}, or a directory")
    parser.add_argument("--quantization", default="nf4", choices=QUANTIZATIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", default="auto", help="auto, plain, or a level of the native ones")
    parser.add_argument("--each", type=int, default=2, help="rows of each rank in the mixed batch")
    parser.add_argument("--most", type=int, default=64, help="streams, at most")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    choice = ModelChoice(options.model, options.quantization, device=options.device, kernels=options.kernels)
    sizes = [size for size in SIZES if size <= options.most]
    costs = measure(choice, options.each, sizes, options.context, options.rounds)
    print(headline(), costs.text(), sep="\n\n")  # noqa: T201  # the result
    sys.exit(0 if costs.keeps_to_the_sum and costs.grows else 1)


if __name__ == "__main__":
    main()
