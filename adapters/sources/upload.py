"""Files of an adapter as a client sends them: written down as they arrive, and a source once they are all there.

folder/files/…     the known files, one part of the form each
folder/archive     or all of them in one archive
"""

import shutil
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter
from manylora.adapters.files import (
    KNOWN_FILES,
    PICKLED,
    WEIGHTS_FILE,
    most_bytes,
    open_directory,
    pickled_weights,
)
from manylora.adapters.sources.archive import SUFFIXES, unpack
from manylora.adapters.sources.source import Copied, Heard, finish, unheard
from manylora.adapters.sources.writing import durable

SHOWN = "upload"
"""What such a source is called."""
_FILES, _ARCHIVE = "files", "archive"


@dataclass(frozen=True, slots=True)
class UploadedSource:
    """What a client has sent. It can be fetched once."""

    folder: Path
    is_archive: bool
    max_bytes: int
    """What it might have in all; what comes out of an archive may have no more."""

    @property
    def is_remote(self) -> bool:
        """Return False: it is here."""
        return False

    @property
    def label(self) -> Hashable:
        """Return what no other upload has."""
        return self.folder.name

    def identify(self, max_bytes: int) -> Hashable:
        """Return what no other upload has; check what can be checked unread. Raises as AdapterFiles."""
        if not self.is_archive:
            open_directory(self.folder / _FILES, max_bytes).close()
        return self.folder.name

    def digest(self, max_bytes: int, heard: Heard = unheard) -> str | None:
        """Return None: it is read once, when it is taken."""
        return None

    def fetch(self, folder: Path, max_bytes: int, heard: Heard = unheard) -> Copied:
        """Move the files into ``folder``, or unpack them there. Raises as unpack and AdapterFiles."""
        max_bytes = min(max_bytes, self.max_bytes)
        if self.is_archive:
            unpack(self.folder / _ARCHIVE, folder, max_bytes)
        else:
            (self.folder / _FILES).rename(folder)
        copied = finish(folder, max_bytes, self.folder.name)
        heard(copied.nbytes, copied.nbytes)
        return copied


class Upload:
    """An adapter that is being sent. Methods block; one caller at a time. ``discard`` it in the end, always."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Make ``folder``. Raises OSError."""
        self._folder = folder
        self._left = max_bytes
        self.max_bytes = max_bytes
        self._names: list[str] = []
        self._file: BinaryIO | None = None
        self._file_left = 0
        self._open = ExitStack()
        folder.mkdir()
        (folder / _FILES).mkdir()

    def begin(self, filename: str) -> None:
        """Write what follows to this file, a known one or an archive. Raises InvalidAdapter, OSError."""
        self._open.close()
        is_archive = _is_archive(filename)
        self._check_name(filename, is_archive=is_archive)
        self._names.append(filename)
        target = (self._folder, _ARCHIVE) if is_archive else (self._folder / _FILES, filename)
        self._file = self._open.enter_context(durable(*target))
        self._file_left = self._left if is_archive else min(self._left, most_bytes(filename, self.max_bytes))

    def write(self, chunk: bytes) -> None:
        """Write on. Raises InvalidAdapter for more than the file, or all of them, may have; OSError."""
        assert self._file is not None
        self._left -= len(chunk)
        self._file_left -= len(chunk)
        if self._file_left < 0:
            raise InvalidAdapter(
                "is over what it may have; see the limits of adapters' files", file=self._names[-1]
            )
        self._file.write(chunk)

    def end(self) -> UploadedSource:
        """Return the source that all files are. Raises AdapterNotFound if there is none, OSError."""
        self._open.close()
        if not self._names:
            raise AdapterNotFound(
                "the form has no files: send adapter_config.json, adapter_model.safetensors and what else belongs to"
                " the adapter, each as a part with that filename, or one .zip or .tar.gz of them"
            )
        return UploadedSource(self._folder, _is_archive(self._names[0]), self.max_bytes)

    def discard(self) -> None:
        """Delete what is left of it."""
        self._open.pop_all()  # what is half there is not to be synced
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _check_name(self, filename: str, *, is_archive: bool) -> None:
        shown = filename[:200]
        if filename == PICKLED and WEIGHTS_FILE not in self._names:
            raise pickled_weights()
        if not is_archive and filename not in KNOWN_FILES:
            raise InvalidAdapter(
                f"{shown!r} is no file of an adapter: send {', '.join(KNOWN_FILES)},"
                f" or one archive ({', '.join(SUFFIXES)})"
            )
        if filename in self._names:
            raise InvalidAdapter("is in the form twice", file=shown)
        if self._names and (is_archive or _is_archive(self._names[0])):
            raise InvalidAdapter("an archive is sent alone: it holds all files of the adapter", file=shown)


def _is_archive(filename: str) -> bool:
    return filename.lower().endswith(SUFFIXES)
