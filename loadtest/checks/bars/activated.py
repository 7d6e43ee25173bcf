"""Activated adapters (aLoRA) over HTTP: mixed with LoRA, a mixture and the base, alone, and by transformers + peft.

Prompts begin with one conversation, so that what the base computed of it is shared by all that are activated later.
Mixtures with an activated part, of which peft knows none, are loadtest/checks/activated_exactness.py's.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from manylora.loadtest.checks.bars.exact import ExactSize, hold_exact
from manylora.loadtest.checks.bars.material import RANKS, TARGETS, VOCABULARY, Material
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.manylora_client import Ask
from manylora.server.kernels.choose import PLAIN

SMALL = ExactSize(requests=24, max_tokens=10, spread_seconds=0.5)
TALK = 230
"""Tokens of the conversation."""
WORDS = VOCABULARY - 16
"""From this id on are invocations; what is talked of has lower ids."""
INVOCATIONS: Sequence[tuple[int, ...]] = (
    (WORDS, WORDS),
    (WORDS + 1, WORDS + 2),
    (WORDS + 3, WORDS + 4, WORDS + 5, WORDS + 6, WORDS + 7),
    (WORDS + 1, WORDS + 8),
)
MIXTURE = (("plain0", 0.7), ("plain1", -0.5))


async def activated(directory: Path, size: ExactSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(
        f"Activated adapters are exact: {len(INVOCATIONS)} of them, two ordinary ones, their mixture and the base,"
        f" kernels: {kernels}"
    )
    material = Material.make(directory, kernels)
    sources = {
        f"judge{number}": material.adapter(number, RANKS[number], TARGETS[number], invocation)
        for number, invocation in enumerate(INVOCATIONS)
    }
    sources |= {
        f"plain{number}": material.adapter(10 + number, RANKS[number + 4], TARGETS[2]) for number in (0, 1)
    }
    mixtures = {"+".join(f"{name}:{weight}" for name, weight in MIXTURE): MIXTURE}
    asks = make_asks([material.base.name, *sources, *mixtures], size)
    await hold_exact(report, directory, material, sources, asks, size, mixtures)
    return report


def make_asks(models: Sequence[str], size: ExactSize) -> list[Ask]:
    """Return requests for all models in turn: of each, some prompts hold every invocation, some one, some none."""
    rng = random.Random(3)
    talk = [rng.randrange(WORDS) for _ in range(TALK)]
    asks = []
    for number in range(size.requests):
        prompt = talk[: rng.randint(TALK // 2, TALK)]
        for invocation in rng.sample(INVOCATIONS, rng.randint(0, len(INVOCATIONS))):
            for _ in range(rng.randint(1, 2)):
                # Towards the end mostly, where a judge is asked; anywhere at times.
                place = rng.choice([len(prompt), len(prompt), rng.randint(0, len(prompt))])
                prompt = [*prompt[:place], *invocation, *prompt[place:]]
        asks.append(Ask(models[number % len(models)], tuple(prompt), size.max_tokens))
    return asks
