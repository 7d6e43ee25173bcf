"""What a way in is: it says what it would bring, and brings it into a folder. Nothing of how."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from manylora.adapters.durable import sync
from manylora.adapters.files import open_directory

Heard = Callable[[int, int | None], object]
"""Told how many bytes are there, and of how many (None: nobody says). What it raises ends the fetch."""


def unheard(done: int, total: int | None) -> None:
    """Hear of no progress."""


@dataclass(frozen=True, slots=True)
class Copied:
    """An adapter's files in a folder: whole, within the limits of files.py, on the disk for good."""

    digest: str
    nbytes: int
    identity: Hashable
    """What ``identify`` says of a source that has these files."""


class Source(Protocol):
    """A place that an adapter may be read from. Methods block, and may be called from any thread. Hashable."""

    @property
    def is_remote(self) -> bool:
        """Whether others decide how long it takes."""
        ...

    @property
    def label(self) -> Hashable:
        """What tells it from other sources, without a secret: it may be kept."""
        ...

    def identify(self, max_bytes: int) -> Hashable:
        """Return what changes whenever the files do, without reading them; check names and sizes.

        Raises AdapterNotFound, AdapterPathForbidden, SourceForbidden, SourceUnreachable, InvalidAdapter.
        """
        ...

    def digest(self, max_bytes: int, heard: Heard = unheard) -> str | None:
        """Return the digest that ``fetch`` would; None if only a fetch can tell. Raises as ``identify``.

        ``heard`` is told how much was read.
        """
        ...

    def fetch(self, folder: Path, max_bytes: int, heard: Heard = unheard) -> Copied:
        """Make ``folder`` and put the adapter's known files into it; what is there after an error is rubbish.

        Raises as ``identify``, and OSError for what the disk of ``folder`` says.
        """
        ...


def finish(folder: Path, max_bytes: int, identity: Hashable) -> Copied:
    """Check and hash the files that lie in ``folder``, and have its names on the disk. Raises as AdapterFiles."""
    with open_directory(folder, max_bytes) as files:
        digest = files.read_through(lambda name: lambda chunk: None)
        sizes = files.sizes
    for inner in {(folder / name).parent for name in sizes}:
        sync(inner)
    sync(folder)
    return Copied(digest, sum(sizes.values()), identity)
