"""What the bar of kinds serves and asks: an adapter of every kind, mixtures of them, prompts that have their tokens."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.mixtures import MixturePart, spell
from manylora.loadtest.checks.bars.material import VOCABULARY, Material
from manylora.loadtest.checks.bars.reference import Mixtures, Reference
from manylora.loadtest.checks.mixture_exactness import draw_mixtures
from manylora.loadtest.material.checkpoints import TINY
from manylora.loadtest.material.manylora_client import Ask
from manylora.loadtest.material.peft_adapters import (
    PeftAdapter,
    activated_kinds,
    linear_kinds,
    tied_kinds,
    token_kinds,
    write_peft_adapter,
)

LONGEST_PROMPT = 300
WORDS = VOCABULARY - 16
"""From this id on are invocations; what is talked of has lower ids."""
INVOCATIONS: Sequence[tuple[int, ...]] = (
    (WORDS, WORDS),
    (WORDS + 1, WORDS + 2),
    (WORDS + 3, WORDS + 4, WORDS + 5, WORDS + 6, WORDS + 7),
    (WORDS + 1, WORDS + 8),
)
MIXTURES: Sequence[Mapping[str, float]] = (
    {"LoRA of two modules": 0.75, "LoRA of all linear": -0.5},
    {
        "DoRA": 0.5,
        "rank and alpha patterns": 1.25,
        "trained biases": -0.5,
        "DoRA with patterns and biases": 0.5,
    },
    {"whole head": 0.5, "factors of both": 0.25, "trained tokens": 1.5, "DoRA": 0.25},
    {"both whole": 0.5},
)


@dataclass(frozen=True, slots=True)
class Served:
    """What there is to ask: a base, adapters and mixtures by the names that requests have for them."""

    material: Material
    adapters: Mapping[str, PeftAdapter]
    mixtures: Mixtures

    @property
    def models(self) -> list[str]:
        """All names, the base's first."""
        return [self.material.base.name, *self.adapters, *self.mixtures]

    @property
    def sources(self) -> dict[str, str]:
        """What to register: the adapters' folders below the root are called as they are."""
        return {name: name for name in self.adapters}

    def reference(self, quantization: str) -> Reference:
        """Return transformers + peft with all of it."""
        paths: dict[str, Path] = {name: self.material.adapters / name for name in self.adapters}
        return Reference(self.material.base, paths, self.mixtures, quantization, self.adapters)

    def own_ids(self, model: str) -> tuple[int, ...]:
        """Return the ids that mean something to this model and not to the base."""
        parts = [name for name, _ in self.mixtures.get(model, ())] or [model]
        kinds = [self.adapters[name] for name in parts if name in self.adapters]
        return tuple(id_ for kind in kinds for id_ in kind.own_ids(TINY.vocab_size))


def make_served(material: Material, drawn: int, *, tied: bool) -> Served:
    """Write the adapters; ``drawn`` mixtures of 2 to 8 of them are drawn beside MIXTURES."""
    linear = linear_kinds()
    kinds = [*activated_kinds(INVOCATIONS), *linear, *token_kinds(TINY.vocab_size)]
    kinds += tied_kinds() if tied else []
    adapters = {_name(kind.name): kind for kind in kinds}
    for seed, (name, kind) in enumerate(adapters.items()):
        write_peft_adapter(material.adapters / name, material.base, kind, seed)
    # peft merges no bias of B into a layer that has none.
    parts = [kind.name for kind in linear if "lora_bias" not in kind.fields]
    mixtures = [list(parts.items()) for parts in MIXTURES]
    mixtures += [
        [(parts[number], weight) for number, weight in mixture]
        for mixture in draw_mixtures(drawn, len(parts), seed=9)
    ]
    return Served(material, adapters, dict(map(_mixture, mixtures)))


def make_asks(served: Served, more: int, talk_tokens: int, max_tokens: int) -> list[Ask]:
    """Return a request for each model whose prompt has the model's own ids, and then ``more``, over all in turn.

    Prompts are parts of one conversation with invocations in it, one, several, twice, or none. Those of every second
    round over the models are random, of any length, and invoke nothing.
    """
    rng = random.Random(3)
    talk = [rng.randrange(WORDS) for _ in range(talk_tokens)]
    models = served.models
    asks = []
    for number in range(len(models) + more):
        model = models[number % len(models)]
        own = served.own_ids(model)
        round_, place = divmod(number, len(models))
        if round_ % 2:
            length = (1, LONGEST_PROMPT)[place] if place < 2 else rng.randint(1, LONGEST_PROMPT)
            prompt = tuple(rng.randrange(WORDS) for _ in range(length))
        else:
            mine = [own] * rng.randint(0 if round_ else 1, 2)
            prompt = _invoked(rng, talk, [*rng.sample(INVOCATIONS, rng.randint(0, len(INVOCATIONS))), *mine])
        size = served.adapters.get(model, PeftAdapter(model)).size
        if size is not None:
            prompt = tuple(min(token, size - 1) for token in prompt)
        asks.append(Ask(model, prompt, max_tokens))
    return asks


def _invoked(rng: random.Random, talk: Sequence[int], runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    prompt = list(talk[: rng.randint(len(talk) // 2, len(talk))])
    for run in runs:
        # Towards the end mostly, where a judge is asked; anywhere at times.
        place = rng.choice([len(prompt), len(prompt), rng.randint(0, len(prompt))])
        prompt[place:place] = run
    return tuple(prompt)


def _mixture(parts: Sequence[tuple[str, float]]) -> tuple[str, list[tuple[str, float]]]:
    named = [(_name(kind), weight) for kind, weight in parts]
    return spell([MixturePart(name, weight) for name, weight in named]), named


def _name(kind: str) -> str:
    return kind.replace(",", "").replace(" ", "-")
