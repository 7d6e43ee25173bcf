"""Directories of the server's disk as sources: from what a client or the operator calls one to its open files.

A client may name what lies inside the adapter root, and nothing else is opened for it whatever changes meanwhile;
the operator may name anything.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from manylora.adapters.durable import sync
from manylora.adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterPathForbidden,
    InvalidAdapter,
    UnsupportedAdapter,
)
from manylora.adapters.files import READING, AdapterFiles, no_folder, open_directory, unreadable
from manylora.adapters.sources.source import Copied, Heard, unheard
from manylora.adapters.sources.writing import durable

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
# Only to pass through: that takes no permission to list what is in a directory.
_PASSING = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A directory that an adapter may be read from."""

    directory: Path
    root: Path | None = None
    """What it must not lead out of, links followed. None: links may lead anywhere, since the operator named it."""

    @property
    def is_remote(self) -> bool:
        """Return False."""
        return False

    @property
    def label(self) -> Hashable:
        """Return what tells it from others."""
        return self

    def identify(self, max_bytes: int) -> Hashable:
        """Return where the files are, their sizes and times of change. Raises what ``open`` raises."""
        with self.open(max_bytes) as files:
            return files.fingerprint

    def digest(self, max_bytes: int, heard: Heard = unheard) -> str:
        """Read the files and return their digest. Raises what ``open`` raises."""
        with self.open(max_bytes) as files:
            tell = _teller(heard, files)
            return files.read_through(lambda name: tell)

    def fetch(self, folder: Path, max_bytes: int, heard: Heard = unheard) -> Copied:
        """Copy the known files into ``folder``, hashing as they pass. Raises what ``open`` raises, and OSError."""
        with self.open(max_bytes) as files, contextlib.ExitStack() as copies:
            folder.mkdir()
            tell = _teller(heard, files)

            def sink_of(name: str) -> Callable[[bytes], object]:
                file = copies.enter_context(durable(folder, name))

                def sink(chunk: bytes) -> None:
                    file.write(chunk)
                    tell(chunk)

                return sink

            digest = files.read_through(sink_of)
            copies.close()
            for inner in {(folder / name).parent for name in files.sizes}:
                sync(inner)
            sync(folder)
            return Copied(digest, sum(files.sizes.values()), files.fingerprint)

    def open(self, max_bytes: int) -> AdapterFiles:
        """Open the adapter's files. Raises AdapterPathForbidden for a way out of ``root``, else as AdapterFiles.

        Below a root no link is followed by the system: each is looked up, checked, and the way to what it names
        opened part by part. What is swapped for a link meanwhile is refused.
        """
        if self.root is None:
            return open_directory(self.directory, max_bytes)
        with _walk(self.root, self.directory) as handle:
            return AdapterFiles(lambda name: self._open_beneath(handle, name), max_bytes)

    def _open_beneath(self, directory: int, name: str) -> int | None:
        folder, _, file = name.rpartition("/")
        try:
            with _beneath(directory, folder) as handle:
                return os.open(file, READING | os.O_NOFOLLOW, dir_fd=handle)
        except FileNotFoundError:
            return None
        except OSError as error:
            # A folder that is a link is none to who follows no link.
            if error.errno != errno.ELOOP and not (folder and error.errno == errno.ENOTDIR):
                raise unreadable(error, name) from error
        assert self.root is not None
        target = _follow(self.directory / name, name)
        _check_inside(target, self.root, name)
        try:
            with _walk(self.root, target.parent) as parent:
                return os.open(target.name, READING | os.O_NOFOLLOW, dir_fd=parent)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _swapped(name) from error
            raise unreadable(error, name) from error


def _teller(heard: Heard, files: AdapterFiles) -> Callable[[bytes], object]:
    """Return what is given each chunk that was read, and tells how many bytes that makes."""
    total, done = sum(files.sizes.values()), 0

    def tell(chunk: bytes) -> None:
        nonlocal done
        done += len(chunk)
        heard(done, total)

    return tell


def operator_source(directory: Path) -> LocalSource:
    """Return a directory that the operator named on the command line. Raises AdapterNotFound."""
    if not _is_directory(directory):
        raise AdapterNotFound(f"{str(directory)!r} is not a directory")
    return LocalSource(directory)


def resolve_source(src: str, root: Path) -> LocalSource:
    """Return the directory that ``src`` names: a path or a file:// URL.

    A relative path starts at ``root`` or, if there is no such directory, where the server was started. Links and
    ``..`` are followed first; the result must lie inside ``root``. Raises UnsupportedAdapter for other kinds of
    source, AdapterPathForbidden, AdapterNotFound.
    """
    inside = root.resolve()
    path = _local_path(src)
    refused: AdapterError | None = None
    for start in (inside, Path.cwd()):
        try:
            return LocalSource(_directory_inside(start / path, inside, src), inside)
        except (AdapterPathForbidden, AdapterNotFound) as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _directory_inside(path: Path, root: Path, src: str) -> Path:
    directory = _follow(path, src)
    _check_inside(directory, root, src)
    if not _is_directory(directory):
        raise AdapterNotFound(
            f"{src!r} is not a directory under the adapter root; give one on the server's disk, or hf://org/name for"
            " one of the hub, where the server may read from it"
        )
    return directory


@contextlib.contextmanager
def _walk(root: Path, directory: Path) -> Iterator[int]:
    """Open ``directory``, which is resolved and inside ``root``, part by part, following no link."""
    handle = os.open(root, _PASSING)
    try:
        for part in directory.relative_to(root).parts:
            try:
                inner = os.open(part, _PASSING | os.O_NOFOLLOW, dir_fd=handle)
            except FileNotFoundError as error:
                raise AdapterNotFound(f"{directory.name!r} is gone; try again") from error
            except OSError as error:
                if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and _is_link(part, handle)):
                    raise _swapped(part) from error
                if error.errno == errno.ENOTDIR:
                    raise no_folder(part) from error
                raise unreadable(error, part) from error
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _beneath(handle: int, folder: str) -> Iterator[int]:
    """Open a folder inside an open one, not by a link; "" is that itself. Raises OSError."""
    if not folder:
        yield handle
        return
    inner = os.open(folder, _PASSING | os.O_NOFOLLOW, dir_fd=handle)
    try:
        yield inner
    finally:
        os.close(inner)


def _is_link(name: str, directory: int) -> bool:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISLNK(found.st_mode)


def _swapped(name: str) -> AdapterPathForbidden:
    return AdapterPathForbidden(f"{name!r} was replaced by a link while the adapter was opened; try again")


def _local_path(src: str) -> Path:
    if not src or "\0" in src:
        raise InvalidAdapter("the source is empty or holds a NUL character; expected a directory")
    scheme = _SCHEME.match(src)
    if scheme is None:
        return Path(src)
    if scheme[1].lower() != "file":
        raise UnsupportedAdapter(f"{scheme[1]}:// sources are not served; give a path or a file:// URL")
    try:
        url = urlsplit(src)
    except ValueError as error:
        raise InvalidAdapter(f"{src!r} is no URL: {error}") from None
    if url.netloc not in ("", "localhost") or url.query or url.fragment or not url.path:
        raise InvalidAdapter(f"{src!r}: a file URL looks like file:///path/to/adapter")
    path = unquote(url.path)
    if "\0" in path:
        raise InvalidAdapter("the source holds a NUL character; expected a directory")
    return Path(path)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _follow(path: Path, src: str) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise AdapterNotFound(f"{src!r} can't be followed: {error}") from error


def _check_inside(path: Path, root: Path, src: str) -> None:
    # Before any look at the disk: what lies outside must not be told apart from what isn't there.
    if not path.is_relative_to(root):
        raise AdapterPathForbidden(f"{src!r} leads out of the directory that adapters may be read from")
