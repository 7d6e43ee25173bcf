"""What is found in a data directory that isn't as it should be."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["fault", "leftover", "note"]
"""What is lost, damaged or contradicts itself; what a crash left and a start sweeps; what may be, if one knows it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that isn't as it should be."""

    level: Level
    kind: str
    """What sort of thing: registry, name, version, mixture, files, orphan, staging, derived, pending, stranger."""
    subject: str
    """What it is about: a name, a version as sql@2, a digest, a file."""
    message: str
    repaired: bool = False


def fault(kind: str, subject: str, message: str) -> Finding:
    """Return what is lost, damaged or contradicts itself."""
    return Finding("fault", kind, subject, message)


def leftover(kind: str, subject: str, message: str) -> Finding:
    """Return what a crash left."""
    return Finding("leftover", kind, subject, message)


def note(kind: str, subject: str, message: str) -> Finding:
    """Return what may be."""
    return Finding("note", kind, subject, message)
