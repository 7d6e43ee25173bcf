"""Adapters at places beyond this machine: a folder's known files one by one, or an archive of them.

What is there is looked at before any of it is read: names, sizes and versions. Which place it is, a Reading knows.
"""

import hashlib
import shutil
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter
from manylora.adapters.files import KNOWN_FILES, PICKLED, check_sizes, most_bytes
from manylora.adapters.sources.archive import unpack
from manylora.adapters.sources.downloading import Seen
from manylora.adapters.sources.source import Copied, Heard, finish, unheard
from manylora.adapters.sources.writing import durable

_ARCHIVE = "archive"
"""What an archive is asked for as: the place knows its name."""


class Reading(Protocol):
    """A place that is being read from: connections, and the time that is left."""

    def look(self, name: str) -> Seen | None:
        """Return what the place says of a file; None: it isn't there."""
        ...

    def read(self, name: str, seen: Seen, most: int, file: BinaryIO, heard: Heard) -> None:
        """Write a file that was ``seen`` so to ``file``, which is empty. Raises InvalidAdapter over ``most`` bytes."""
        ...


@dataclass(frozen=True, slots=True)
class RemoteSource:
    """An adapter at a place. Two are the same if they read the same place in the same way, with the same token."""

    where: str = field(repr=False)
    """The URL, or what else names the place. Its query may be a secret."""
    token: str | None = field(repr=False)
    start: Callable[[], AbstractContextManager[Reading]] = field(compare=False, repr=False)
    shown: str = field(compare=False)
    """The place as it may be told and logged."""
    is_archive: bool = False
    """Whether the place has one file, with all others in it."""

    @property
    def is_remote(self) -> bool:
        """Return True."""
        return True

    @property
    def label(self) -> Hashable:
        """Return a hash: the URL may be signed, and the token opens more than this."""
        return hashlib.sha256(f"{self.where}\0{self.token}".encode()).digest()

    def identify(self, max_bytes: int) -> Hashable:
        """Return the files' versions, as their place tells them. Raises as Source.identify."""
        with self.start() as reading:
            return _identity(self._seen(reading, max_bytes))

    def digest(self, max_bytes: int, heard: Heard = unheard) -> str | None:
        """Return None: nobody there tells a digest of ours."""
        return None

    def fetch(self, folder: Path, max_bytes: int, heard: Heard = unheard) -> Copied:
        """Download the known files into ``folder``. Raises as Source.fetch."""
        with self.start() as reading:
            seen = self._seen(reading, max_bytes)
            identity = _identity(seen)
            if not self.is_archive:
                folder.mkdir()
                _download(reading, seen, folder, max_bytes, heard)
                return finish(folder, max_bytes, identity)
            beside = folder.with_name(f"{folder.name}.archive")
            try:
                beside.mkdir()
                _download(reading, seen, beside, max_bytes, heard)
                unpack(beside / _ARCHIVE, folder, max_bytes)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            return finish(folder, max_bytes, identity)

    def _seen(self, reading: Reading, max_bytes: int) -> Mapping[str, Seen]:
        """Return what is there, by name, checked."""
        if self.is_archive:
            seen = reading.look(_ARCHIVE)
            if seen is None:
                raise AdapterNotFound(f"there is nothing at {self.shown!r}")
            if seen.size is not None and seen.size > max_bytes:
                raise InvalidAdapter(f"{seen.size} bytes; at most {max_bytes}", file=self.shown)
            return {_ARCHIVE: seen}
        found = {name: reading.look(name) for name in KNOWN_FILES}
        there = {name: seen for name, seen in found.items() if seen is not None}
        check_sizes(
            {name: seen.size or 0 for name, seen in there.items()},
            lambda: reading.look(PICKLED) is not None,
            max_bytes,
        )
        return there


def _identity(seen: Mapping[str, Seen]) -> Hashable:
    """Return what tells these versions from others; where a place doesn't tell, nothing is the same as anything."""
    if any(each.tag is None for each in seen.values()):
        return object()
    return tuple((name, each.tag, each.size) for name, each in seen.items())


def _download(reading: Reading, seen: Mapping[str, Seen], folder: Path, max_bytes: int, heard: Heard) -> None:
    sizes = [each.size for each in seen.values()]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    before = 0
    heard(0, total)
    for name, each in seen.items():
        limit = most_bytes(name, max_bytes) if name in KNOWN_FILES else max_bytes
        most = min(limit, max_bytes - before)
        with durable(folder, name) as file:
            reading.read(name, each, most, file, _from(before, total, heard))
            before += file.tell()
        if each.sha256 is not None:
            _check_hash(folder / name, name, each.sha256)


def _from(before: int, total: int | None, heard: Heard) -> Heard:
    return lambda done, _: heard(before + done, total)


def _check_hash(path: Path, name: str, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InvalidAdapter(
            f"came with the sha256 {found}, and its place says {expected}: try again, or ask who keeps it there",
            file=name,
        )
