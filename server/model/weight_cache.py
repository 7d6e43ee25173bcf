"""Prepared weights in files, so that the next start maps them: found by key, bounded in size, the longest unused first
to go.

    directory/<key>.weights    written whole, never again; its time is when it was last used
    directory/<…>.partial      being written, and locked by whoever does; unlocked it is rubbish

Several processes may share a directory. Whatever is wrong with a file, or with the disk, costs time and is said: it
never ends a start.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from manylora.adapters.durable import sync
from manylora.server.model.kept_model import DIGITS, KeptModel
from manylora.server.model.weight_file import BrokenFile, bytes_of, open_file, write_file

WEIGHTS = "weights"
"""The directory in a server's data directory."""
ENDING, PARTIAL = ".weights", ".partial"
KEY = re.compile(rf"[0-9a-f]{{{DIGITS}}}")
ROOM = 1 << 28
"""Bytes of the disk that are left free."""
log = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache."""

    key: str
    nbytes: int
    used: float
    """When it was last used, seconds since 1970."""


class WeightCache:
    """The files below ``directory``, which is made when there is one to write. Methods block, from any thread."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._directory = directory
        self._most_bytes = most_bytes
        self._waiting: list[tuple[str, KeptModel, Mapping[str, Any]]] = []

    def find(self, key: str, put_together: Callable[[KeptModel], Found]) -> Found | None:
        """Return what ``put_together`` makes of the weights kept under ``key``, mapped; None if there are none.

        A file that is broken, or that ``put_together`` raises ValueError for, is deleted.
        """
        path = self._path(key)
        try:
            file = open_file(path)
            if file.facts.get("key") != key:
                raise BrokenFile("it was kept under another name")
            found = put_together(KeptModel(file.facts["matrices"], file.tensors))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError) as error:
            log.warning("kept weights %s are thrown away and made anew: %s", path, error)
            self.remove(key)
            return None
        with contextlib.suppress(OSError):  # a directory that may only be read
            os.utime(path)
        return found

    def keep_later(self, key: str, model: KeptModel, about: Mapping[str, Any]) -> None:
        """Have ``write`` keep ``model``; ``about`` says to people what it is."""
        self._waiting.append((key, model, about))

    def write(self) -> None:
        """Write what waits: whole, or not at all and said. Takes as long as the disk does."""
        while self._waiting:
            key, model, about = self._waiting.pop()
            try:
                self._write(key, model, about)
            except OSError as error:
                log.warning("the weights can't be kept for the next start in %s: %s", self._directory, error)
        self.sweep()

    def entries(self) -> list[Entry]:
        """Return all files, the last used first."""
        found = []
        for path in self._files(ENDING):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append(Entry(path.name.removesuffix(ENDING), status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def about(self, key: str) -> Mapping[str, Any]:
        """Return what was said of a file when it was kept. Raises BrokenFile, OSError."""
        about = open_file(self._path(key)).facts.get("about")
        return about if isinstance(about, dict) else {}

    def check(self, key: str) -> None:
        """Read all of a file. Raises BrokenFile, OSError."""
        damaged = open_file(self._path(key)).damaged()
        if damaged is not None:
            raise BrokenFile(f"{damaged} isn't what was written")

    def remove(self, key: str) -> bool:
        """Delete a file; return whether it was there. Who has it mapped keeps it until he lets go."""
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("%s can't be deleted: %s", self._path(key), error.strerror)
            return False
        return True

    def sweep(self, room: int = 0) -> None:
        """Delete the longest unused until the rest and ``room`` more are in bounds, and what was left half written."""
        for path in self._files(PARTIAL):
            _remove_if_abandoned(path)
        held = self.entries()
        total = sum(entry.nbytes for entry in held) + room
        while held and total > self._most_bytes:
            oldest = held.pop()
            total -= oldest.nbytes
            if self.remove(oldest.key):
                log.info("kept weights %s made room for others", oldest.key)

    def _write(self, key: str, model: KeptModel, about: Mapping[str, Any]) -> None:
        size = bytes_of(model.tensors)
        if size > self._most_bytes:
            log.warning(
                "the weights aren't kept for the next start: they take %s, and the cache may have %s",
                _mib(size),
                _mib(self._most_bytes),
            )
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        self.sweep(room=size)
        free = shutil.disk_usage(self._directory).free
        if free < size + ROOM:
            raise OSError(f"they take {_mib(size)}, and {_mib(free)} are free on its disk")
        with _partial(self._directory) as (file, path):
            write_file(file, model.tensors, {"key": key, "about": about, "matrices": model.facts})
            path.rename(self._path(key))
        sync(self._directory)

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise BrokenFile(f"{key!r} is no key: {DIGITS} hex digits are")
        return self._directory / f"{key}{ENDING}"

    def _files(self, ending: str) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from (
                path
                for path in sorted(self._directory.glob(f"*{ending}"))
                if ending == PARTIAL or KEY.fullmatch(path.name.removesuffix(ending))
            )


@contextlib.contextmanager
def _partial(directory: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Yield a new file, locked, and its name; it is deleted unless it was renamed."""
    path = directory / f"{uuid.uuid4().hex}{PARTIAL}"
    with path.open("xb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file, path
        finally:
            path.unlink(missing_ok=True)


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"
