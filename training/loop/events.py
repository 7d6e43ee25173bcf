"""What happened in a run beside its steps: said once, with the step, to whoever shows or keeps it."""

from collections.abc import Callable

from manylora.training.report.record import Event

Listener = Callable[[Event], None]


class Events:
    """A list of events, and those who listen. Kinds: note, backoff, warning, split, rank, flat, checkpoint."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.all: list[Event] = []

    def say(self, step: int, kind: str, sentence: str) -> None:
        """Keep an event and tell the listeners."""
        event = Event(step, kind, sentence)
        self.all.append(event)
        for listener in self.listeners:
            listener(event)
