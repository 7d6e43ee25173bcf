"""What is asked: for each request of a run which model, which prompt, how long and, in an open loop, when.

The same plan for HTTP, engine and peft; the latter two know closed loops of one length only.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

from manylora.loadtest.bench.arrivals import Arrivals
from manylora.loadtest.bench.lengths import Lengths
from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.traces import Recorded

REQUESTS_PER_STREAM = 8
"""Requests of a run in which nobody said how many."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a run."""

    model: int
    """Place in the list of models (adapters, or the base)."""
    prompt: int
    """Number of the prompt."""
    input_tokens: int
    """Of the prompt, about."""
    output_tokens: int
    """Of the answer."""
    text: str | None = None
    """The prompt itself, where a trace has it."""
    at: float | None = field(default=None, compare=False)
    """When it is due, in seconds from the beginning; None: in a closed loop, when a stream is free."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The shape of a run.

    A closed loop, in which each of ``streams`` clients asks again when it has its answer; or an open one, if there are
    arrivals or a trace with times: then requests are sent when they are due, whatever the server does.
    """

    streams: int
    popularity: Popularity
    input_tokens: int
    output_tokens: int
    requests: int
    """Requests that count, over all streams."""
    prompts: int
    """Different prompts; 0: one for each request. Repeated ones meet prefix caches."""
    seed: int
    lengths: Lengths | None = None
    """None: all requests have the lengths above."""
    arrivals: Arrivals | None = None
    trace: tuple[Recorded, ...] = ()
    """Asked in its order, as often as ``requests`` say; its times count unless there are arrivals."""

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        for name in ("streams", "input_tokens", "output_tokens", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        timed = self.arrivals is None and any(each.at is not None for each in self.trace)
        if timed and self.requests > len(self.trace):
            raise ValueError(f"{self.requests} requests: the trace has times for {len(self.trace)}")

    @property
    def is_open(self) -> bool:
        """Whether requests are sent when they are due."""
        return self.arrivals is not None or any(each.at is not None for each in self.trace)

    def plan(self, models: int) -> list[Planned]:
        """Return the counted requests in order."""
        chosen = self.popularity.assign(self.requests, models, self.seed)
        prompts = self.prompts or self.requests
        sizes, times = self._sizes(self.requests, self.seed), self._times()
        return [
            Planned(model, number % prompts, *sizes[number], self._text(number), times[number])
            for number, model in enumerate(chosen)
        ]

    def warm_up(self, models: int, count: int) -> list[Planned]:
        """Return ``count`` requests that come first and don't count, for one model after the other.

        Their prompts are none of the counted ones, so that no cache knows those.
        """
        first, sizes = self.prompts or self.requests, self._sizes(count, self.seed + 1)
        return [Planned(number % models, first + number, *sizes[number]) for number in range(count)]

    def _sizes(self, count: int, seed: int) -> list[tuple[int, int]]:
        if self.trace:
            return [(each.input_tokens, each.output_tokens) for each in islice(cycle(self.trace), count)]
        if self.lengths is not None:
            return self.lengths.draw(count, seed)
        return [(self.input_tokens, self.output_tokens)] * count

    def _times(self) -> list[float | None]:
        if self.arrivals is not None:
            return [*self.arrivals.times(self.requests, self.seed)]
        return [each.at for each in islice(cycle(self.trace), self.requests)] or [None] * self.requests

    def _text(self, number: int) -> str | None:
        return self.trace[number % len(self.trace)].text if self.trace else None

    def to_json(self) -> dict[str, object]:
        """Return the settings as JSON values; of a trace its length."""
        return {
            "streams": self.streams,
            "popularity": str(self.popularity),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "requests": self.requests,
            "prompts": self.prompts,
            "seed": self.seed,
            "lengths": None if self.lengths is None else str(self.lengths),
            "arrivals": None if self.arrivals is None else str(self.arrivals),
            "trace_requests": len(self.trace),
            "loop": "open" if self.is_open else "closed",
        }


def endless(plan: list[Planned]) -> Iterator[Planned]:
    """Repeat a plan, for runs that last a time."""
    return cycle(plan)


def token_prompt(number: int, length: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    """Return prompt ``number`` as token ids: noise, the same for the same seed."""
    rng = random.Random(f"{seed}/{number}")
    return tuple(islice(iter(lambda: rng.randrange(vocab_size), None), length))
