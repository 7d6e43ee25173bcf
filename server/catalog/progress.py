"""How far a registration is, as whoever asks sees it. Written by the threads that do the work."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["waiting", "downloading", "copying", "checking", "loading"]


@dataclass(slots=True)
class Progress:
    """One piece of work, which several registrations may share."""

    phase: Phase = "waiting"
    done: int = 0
    """Bytes that have come."""
    total: int | None = None
    """Bytes that are to come; None: nobody says."""
    is_remote: bool = False
    """Whether others decide how long it takes."""

    def enter(self, phase: Phase) -> None:
        """Say what is being done now."""
        self.phase = phase
