"""Where the time of the engine's steps goes: an observer that keeps StepTimings and adds them up by part."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from manylora.loadtest.material.summary import Spread
from manylora.loadtest.material.text_table import milliseconds, text_table
from manylora.server.engine.observer import SilentEngineObserver, StepTimings

PARTS = ("schedule", "place", "batch", "model", "sample", "commit", "rest", "sse")
KERNELS = ("model", "place")
"""Parts that are kernels or copies of weights; the others are the step's overhead."""


@dataclass(frozen=True, slots=True)
class StepShares:
    """Mean seconds that a step's parts took, over ``steps`` steps."""

    steps: int
    schedule: float
    place: float
    """Copying adapters into the arena."""
    batch: float
    """Building the step's arrays, handing them over, looking at what came back."""
    model: float
    sample: float
    commit: float
    """Stop conditions, the books."""
    rest: float
    """What the engine does between these."""
    sse: float
    """Formatting the events."""
    total: Spread
    """Seconds of whole steps."""

    @property
    def overhead(self) -> float:
        """The share of a step, 0 to 1, that is neither the model nor a copy."""
        spent = self._parts()
        return (
            sum(v for k, v in spent.items() if k not in KERNELS) / sum(spent.values()) if self.steps else 0.0
        )

    def to_json(self) -> dict[str, object]:
        """Return the numbers as JSON values."""
        return {
            "steps": self.steps,
            "mean_seconds": self._parts(),
            "total": self.total.to_json(),
            "overhead": self.overhead,
        }

    def table(self) -> str:
        """Return the parts as a table."""
        parts = self._parts()
        whole = sum(parts.values()) or 1.0
        rows = [[name, milliseconds(each), f"{100 * each / whole:.1f} %"] for name, each in parts.items()]
        rows.append(["step", milliseconds(whole), "100.0 %"])
        return text_table(["part", "mean ms", "share"], rows)

    def _parts(self) -> dict[str, float]:
        values = asdict(self)
        return {name: values[name] for name in PARTS}


@dataclass(frozen=True, slots=True)
class _Step:
    timings: StepTimings
    engine: float
    """Seconds of Engine.step as its caller sees it."""
    sse: float


class StepLog(SilentEngineObserver):
    """Keeps every step's timings."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._last: StepTimings | None = None

    def step_finished(self, timings: StepTimings) -> None:
        """Keep the timings of the step under way."""
        self._last = timings

    def step_ended(self, engine: float, sse: float) -> None:
        """Note what the caller of the step measured; steps that computed nothing are left out."""
        if self._last is not None:
            self._steps.append(_Step(self._last, engine, sse))
        self._last = None

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()

    def decode(self, streams: int) -> StepShares:
        """Return the means over steps in which ``streams`` sequences each computed one token."""
        return _shares([s for s in self._steps if s.timings.tokens == s.timings.sequences == streams])

    def every(self) -> StepShares:
        """Return the means over all steps."""
        return _shares(self._steps)


def _shares(steps: Sequence[_Step]) -> StepShares:
    count = max(1, len(steps))

    def mean(name: str) -> float:
        return math.fsum(getattr(step.timings, name) for step in steps) / count

    return StepShares(
        steps=len(steps),
        schedule=mean("schedule"),
        place=mean("place"),
        batch=mean("batch"),
        model=mean("model"),
        sample=mean("sample"),
        commit=mean("commit"),
        rest=sum(step.engine - step.timings.total for step in steps) / count,
        sse=sum(step.sse for step in steps) / count,
        total=Spread.of(step.engine + step.sse for step in steps),
    )
