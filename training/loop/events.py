"""What happened in a run beside its steps: said once, with the step, to whoever shows or keeps it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a user should know."""

    step: int
    kind: str
    """note, backoff, split, rank, flat, checkpoint or stop."""
    sentence: str


Listener = Callable[[Event], None]


class Events:
    """A list of events, and those who listen."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.all: list[Event] = []

    def say(self, step: int, kind: str, sentence: str) -> None:
        """Keep an event and tell the listeners."""
        event = Event(step, kind, sentence)
        self.all.append(event)
        for listener in self.listeners:
            listener(event)
