"""Archives of an adapter, from strangers: zip, tar, tar.gz. Its known files come out; nothing else touches the disk.

Paths that lead out, links, devices and pipes refuse the archive, wherever they are in it. What an archive says of sizes
is believed of what is too much alone: bytes are counted as they come out, and so is what is read of its own tables.
"""

import contextlib
import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, cast

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import KNOWN_FILES, PICKLED, most_bytes, pickled_weights
from manylora.adapters.sources.writing import durable

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
"""Of the names that archives have."""
MOST_ENTRIES = 4096
MOST_TABLES = 4 << 20
"""Bytes of an archive's own: names, sizes and times."""
_CHUNK = 1 << 20
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error),
    *(EOFError, NotImplementedError, RuntimeError, UnicodeError, ValueError),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    size: int
    """As the archive claims."""
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, max_bytes: int) -> None:
    """Make ``folder`` and put the known files of the adapter in ``archive`` into it.

    The adapter is at the archive's top or in one folder of it. Raises InvalidAdapter, UnsupportedAdapter,
    AdapterNotFound, and OSError for what the disk says.
    """
    with archive.open("rb") as raw:
        kind = _kind(raw)
        folder.mkdir()
        try:
            with contextlib.ExitStack() as closing:
                if kind == "zip":
                    _unpack_zip(_Metered(raw, max_bytes), folder, max_bytes)
                    return
                plain = raw if kind == "tar" else closing.enter_context(_gunzipped(raw))
                _unpack_tar(plain, folder, max_bytes)
        except _DAMAGED as error:
            raise InvalidAdapter(f"the archive can't be read as {kind}: {str(error)[:200]}") from None


def _kind(raw: BinaryIO) -> str:
    head = raw.read(512)
    raw.seek(0)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if head[:2] == b"\x1f\x8b":
        return "tar.gz"
    if head[257:262] == b"ustar":
        return "tar"
    raise InvalidAdapter(
        "the file is no archive that is read: send a .zip, a .tar or a .tar.gz, or the files one by one"
    )


class _Metered(io.RawIOBase):
    """An archive's bytes, of which its own tables may take so many and no more."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        super().__init__()
        self._file = file
        self._left = MOST_TABLES
        # Half a kilobyte for each entry, and what fills the last block of each.
        self._furthest = max_bytes + MOST_TABLES + 2048 * MOST_ENTRIES
        self.in_content = False
        """What is read now is an entry's content, which is counted where it comes out."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and offset > self._furthest:
            raise _too_large()
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if self.in_content:
            return self._file.read(min(size, 2 * _CHUNK) if size >= 0 else 2 * _CHUNK)
        if size < 0 or size > self._left:
            found = self._file.read(self._left + 1)
            if len(found) > self._left:
                raise InvalidAdapter(
                    f"the archive's tables have over {MOST_TABLES} bytes; leave out what isn't needed"
                )
        else:
            found = self._file.read(size)
        self._left -= len(found)
        return found


def _unpack_zip(source: _Metered, folder: Path, max_bytes: int) -> None:
    with zipfile.ZipFile(source) as archive:
        entries = []
        for info in archive.infolist():
            mode = info.external_attr >> 16
            if info.is_dir():
                _check_path(info.filename)
                continue
            # Those made without modes have none.
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise _no_file(info.filename)
            if info.flag_bits & 0x1:
                raise UnsupportedAdapter(f"{info.filename[:200]!r} in the archive is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UnsupportedAdapter(
                    f"{info.filename[:200]!r} in the archive is compressed in a way that isn't read: use deflate"
                )
            entries.append(_Entry(_check_path(info.filename), info.file_size, partial(archive.open, info)))
        inner = _folder_of([entry.name for entry in entries])
        left = max_bytes
        for entry in entries:
            left -= _take(source, entry, inner, folder, left)


def _unpack_tar(plain: IO[bytes], folder: Path, max_bytes: int) -> None:
    """Read it twice: where the adapter is in it is known once all names are."""
    inner = _folder_of([entry.name for entry in _tar_entries(_Metered(plain, max_bytes))])
    plain.seek(0)
    source, left = _Metered(plain, max_bytes), max_bytes
    for entry in _tar_entries(source):
        left -= _take(source, entry, inner, folder, left)


def _tar_entries(source: _Metered) -> Iterator[_Entry]:
    count = 0
    with tarfile.open(fileobj=source, mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            count += 1
            if count > MOST_ENTRIES:
                raise _too_many()
            path = _check_path(info.name)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                raise _no_file(info.name)
            opened = archive.extractfile(info)
            assert opened is not None
            yield _Entry(path, info.size, partial(_itself, opened))


def _gunzipped(raw: BinaryIO) -> AbstractContextManager[IO[bytes]]:
    return cast("AbstractContextManager[IO[bytes]]", gzip.GzipFile(fileobj=raw))


def _itself(opened: IO[bytes]) -> IO[bytes]:
    return opened


def _check_path(name: str) -> str:
    """Return an entry's path without "./". Raises InvalidAdapter for one that leads anywhere but down."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    leads_out = name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or name[1:2] == ":"
    if leads_out:
        raise InvalidAdapter(
            f"the archive's entry {name[:200]!r} leads out of it: paths are relative, and without .."
        )
    return "/".join(parts)


def _folder_of(names: list[str]) -> str:
    """Return the folder that the adapter is in, "" or ending in a slash."""
    if len(names) > MOST_ENTRIES:
        raise _too_many()
    config = KNOWN_FILES[0]
    found = [name.removesuffix(config) for name in names if name == config or name.endswith(f"/{config}")]
    if not found:
        raise AdapterNotFound("the archive holds no adapter_config.json; a PEFT adapter has one")
    if len(set(found)) > 1:
        raise InvalidAdapter(f"the archive holds {len(set(found))} adapters; send one at a time")
    folder = found[0]
    if folder.count("/") > 1:
        raise InvalidAdapter("the adapter must be at the archive's top, or in one folder of it")
    if f"{folder}{PICKLED}" in names and f"{folder}{KNOWN_FILES[1]}" not in names:
        raise pickled_weights()
    return folder


def _take(source: _Metered, entry: _Entry, inner: str, folder: Path, left: int) -> int:
    """Write an entry, if it is a known file; return its bytes."""
    name = entry.name.removeprefix(inner)
    if not entry.name.startswith(inner) or name not in KNOWN_FILES:
        return 0
    most = min(left, most_bytes(name, left))
    if entry.size > most:
        raise InvalidAdapter(f"{entry.size} bytes; at most {most}", file=name)
    source.in_content = True
    done = 0
    try:
        with durable(folder, name) as file, entry.open() as content:
            while chunk := content.read(_CHUNK):
                done += len(chunk)
                if done > most:
                    raise InvalidAdapter(f"over {most} bytes come out of the archive", file=name)
                file.write(chunk)
    except FileExistsError:
        raise InvalidAdapter("is in the archive twice", file=name) from None
    finally:
        source.in_content = False
    if done != entry.size:
        raise InvalidAdapter("ends before its archive says so: the archive is cut short", file=name)
    return done


def _no_file(name: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"the archive's entry {name[:200]!r} is a link, a device or a pipe: only plain files are taken"
    )


def _too_many() -> InvalidAdapter:
    return InvalidAdapter(f"the archive has over {MOST_ENTRIES} entries; leave out what isn't the adapter's")


def _too_large() -> InvalidAdapter:
    return InvalidAdapter("the archive says that it is larger than an adapter may be")
