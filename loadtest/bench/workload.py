"""What is asked: for each request of a run, which model and which prompt. The same plan for HTTP, engine and peft."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

from manylora.loadtest.bench.popularity import Popularity

REQUESTS_PER_STREAM = 8
"""Requests of a run in which nobody said how many."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a run."""

    model: int
    """Place in the list of models (adapters, or the base)."""
    prompt: int
    """Number of the prompt."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The shape of a run. A closed loop: each of ``streams`` clients asks again when it has its answer."""

    streams: int
    popularity: Popularity
    input_tokens: int
    output_tokens: int
    requests: int
    """Requests that count, over all streams."""
    prompts: int
    """Different prompts; 0: one for each request. Repeated ones meet prefix caches."""
    seed: int

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("streams", "input_tokens", "output_tokens", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def plan(self, models: int) -> list[Planned]:
        """Return the counted requests in order."""
        chosen = self.popularity.assign(self.requests, models, self.seed)
        prompts = self.prompts or self.requests
        return [Planned(model, number % prompts) for number, model in enumerate(chosen)]

    def warm_up(self, models: int, count: int) -> list[Planned]:
        """Return ``count`` requests that come first and don't count, for one model after the other.

        Their prompts are none of the counted ones, so that no cache knows those.
        """
        first = self.prompts or self.requests
        return [Planned(number % models, first + number) for number in range(count)]


def endless(plan: list[Planned]) -> Iterator[Planned]:
    """Repeat a plan, for runs that last a time."""
    return cycle(plan)


def token_prompt(number: int, length: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    """Return prompt ``number`` as token ids: noise, the same for the same seed."""
    rng = random.Random(f"{seed}/{number}")
    return tuple(islice(iter(lambda: rng.randrange(vocab_size), None), length))
