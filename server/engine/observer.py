"""What the engine tells about its work, for metrics and benchmarks. Called on the engine's thread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepTimings:
    """Seconds that a step's parts took, and what it computed."""

    schedule: float
    place: float
    """Copying adapters into the arena."""
    batch: float
    """Building the step's arrays, handing them over and looking at what came back."""
    model: float
    """Layers and head, measured where they ran."""
    sample: float
    """Choosing tokens and log probabilities, likewise."""
    commit: float
    """Stop conditions and the books."""
    tokens: int
    sequences: int

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.schedule + self.place + self.batch + self.model + self.sample + self.commit


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request that is over."""

    adapter_label: str
    outcome: str
    """"finished", "aborted" or "failed"."""
    queue_seconds: float | None
    """From arrival to its first step; None if it never had one."""
    first_token_seconds: float | None
    seconds: float
    prompt_tokens: int
    generated_tokens: int


class EngineObserver(Protocol):
    """Hears what happened. Must be quick and must not raise."""

    def step_finished(self, timings: StepTimings) -> None:
        """A step that computed something."""
        ...

    def token_gaps(self, seconds: Sequence[float]) -> None:
        """In a step sequences got a token, each so long after the one before."""
        ...

    def request_ended(self, ended: EndedRequest) -> None:
        """A request is over, one way or another."""
        ...

    def adapter_read(self, seconds: float) -> None:
        """An adapter's weights were read from disk again."""
        ...

    def adapter_placed(self, seconds: float) -> None:
        """An adapter's weights were copied into the arena."""
        ...


class SilentEngineObserver:
    """The observer that does nothing."""

    def step_finished(self, timings: StepTimings) -> None:
        """Do nothing."""

    def token_gaps(self, seconds: Sequence[float]) -> None:
        """Do nothing."""

    def request_ended(self, ended: EndedRequest) -> None:
        """Do nothing."""

    def adapter_read(self, seconds: float) -> None:
        """Do nothing."""

    def adapter_placed(self, seconds: float) -> None:
        """Do nothing."""
