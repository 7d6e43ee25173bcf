"""Object stores as places, through fsspec: s3, gs and az, with what rights the server's environment has there."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, Protocol

import fsspec

from manylora.adapters.errors import AdapterError, InvalidAdapter, SourceUnreachable, UnsupportedAdapter
from manylora.adapters.files import OPTIONAL_FILES
from manylora.adapters.sources.allowed import Place
from manylora.adapters.sources.downloading import Seen, changed
from manylora.adapters.sources.source import Heard
from manylora.adapters.sources.web import Web, WebLimits

EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""What fsspec reads a scheme with. Each is an extra by the scheme's name."""
PIECE = 8 << 20


class FileSystem(Protocol):
    """What is asked of a file system of fsspec's."""

    def info(self, path: str) -> Mapping[str, object]:
        """Return an object's size and what else is known. Raises FileNotFoundError."""
        ...

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        """Return a part of an object."""
        ...


def _file_system(scheme: str) -> FileSystem:
    try:
        # Each fetch its own: one that is kept would remember what was listed.
        found: FileSystem = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
        return found
    except ImportError:
        raise UnsupportedAdapter(
            f"{scheme}:// is read with {EXTRAS[scheme]}, which isn't installed where the server runs:"
            f" pip install 'manylora[{scheme}]' there"
        ) from None


@dataclass(frozen=True, slots=True)
class ObjectReading:
    """A prefix of a bucket, or one archive, read with what rights the server's environment has."""

    web: Web
    """For the time that is left."""
    place: Place
    is_archive: bool
    files: FileSystem

    def look(self, name: str) -> Seen | None:
        """Return an object's size, and what changes with it."""
        path = self._of(name)
        try:
            self.web.check_time()
            found = self.files.info(path)
        except (FileNotFoundError, IsADirectoryError):
            return None
        except PermissionError as error:
            if name in OPTIONAL_FILES:  # who may not list is told no more of what isn't there
                return None
            self._fail(error)
        except Exception as error:
            self._fail(error)
        if found.get("type") == "directory":
            return None
        size = found.get("size")
        return Seen(size if isinstance(size, int) else None, str(sorted(found.items(), key=str))[:4096])

    def read(self, name: str, seen: Seen, most: int, file: BinaryIO, heard: Heard) -> None:
        """Download an object piece by piece; a piece that fails is asked for again."""
        size = seen.size
        if size is None:
            raise InvalidAdapter("its place doesn't say how large it is", file=name)
        if size > most:
            raise InvalidAdapter(f"{size} bytes; at most {most}", file=name)
        while file.tell() < size:
            piece = self._piece(self._of(name), file.tell(), min(size, file.tell() + PIECE))
            if not piece or file.tell() + len(piece) > size:
                raise changed(name)
            file.write(piece)
            heard(file.tell(), size)
        if self.look(name) != seen:
            raise changed(name)

    def _piece(self, path: str, start: int, end: int) -> bytes:
        pauses = iter(self.web.limits.pauses)
        while True:
            self.web.check_time()
            try:
                return self.files.cat_file(path, start=start, end=end)
            except Exception as error:
                pause = next(pauses, None)
                if pause is None or isinstance(error, (FileNotFoundError, PermissionError)):
                    self._fail(error)
                self.web.pause(pause)

    def _of(self, name: str) -> str:
        root = f"{self.place.host}/{self.place.path}".rstrip("/")
        return root if self.is_archive else f"{root}/{name}"

    def _fail(self, error: Exception) -> NoReturn:
        if isinstance(error, AdapterError):
            raise error
        if isinstance(error, FileNotFoundError):
            raise changed(str(self.place)) from None
        # Texts of these libraries quote signed URLs.
        raise SourceUnreachable(
            f"{str(self.place)!r} can't be read with the server's own rights there: {type(error).__name__}"
        ) from None


@contextlib.contextmanager
def reading_objects(place: Place, limits: WebLimits, is_archive: bool) -> Iterator[ObjectReading]:
    """Read from a bucket within the ``with``. Raises UnsupportedAdapter, naming the extra that is missing."""
    files = _file_system(place.scheme)
    with Web(limits, lambda place: False) as web:
        yield ObjectReading(web, place, is_archive, files)
