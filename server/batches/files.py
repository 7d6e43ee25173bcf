"""Files that clients left, on the disk: written as they arrive, there for good once they are whole, bounded in all.

directory/batches.db       what there is
directory/files/<id>       a file's content
directory/files/.<id>      one that is being written; whatever a crash leaves here is rubbish
directory/inputs/<id>      a batch's own link to what it reads: the file may be deleted meanwhile
"""

import contextlib
import errno
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from manylora.adapters.durable import put_in_place, sync
from manylora.adapters.errors import StoreFull
from manylora.server.batches.database import BatchDatabase
from manylora.server.batches.records import StoredFile
from manylora.server.batches.room import Room
from manylora.server.errors import BodyTooLarge, ObjectNotFound

LONGEST_NAME = 255
"""Characters of a file's name that are kept."""


class FileStore:
    """All methods block; any thread may call them. Raises StoreFull on a full disk."""

    def __init__(self, directory: Path, *, largest: int, most: int) -> None:
        """``largest``: bytes of one file; ``most``: of all together."""
        for name in ("files", "inputs"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.database = BatchDatabase(directory / "batches.db")
        self.largest = largest
        self._room = Room(most, self._held)
        self.sweep()
        self._clear()

    def sweep(self) -> None:
        """Delete the files whose time is over. What is being written or ended meanwhile is left alone."""
        for file_id in self.database.expired_files(int(time.time())):
            self.database.delete_file(file_id)
            (self._directory / "files" / file_id).unlink(missing_ok=True)

    def _clear(self) -> None:
        """Delete what a crash left and nobody knows: at the start alone, before anything is being written."""
        known, wanted = self.database.file_ids(), {batch.id for batch in self.database.unfinished()}
        for name, ids in (("files", known), ("inputs", wanted)):
            for path in (self._directory / name).iterdir():
                if path.name not in ids:
                    path.unlink(missing_ok=True)

    def new(self, owner: str = "", *, bounded: bool = True) -> "Incoming":
        """Begin an owner's file, to be written in pieces. What a batch makes is there already, and isn't bounded."""
        largest = self.largest if bounded else sys.maxsize
        if bounded:
            self._room.look()
        room = self._room if bounded else None
        return Incoming(self._directory / "files", f"file-{uuid.uuid4().hex}", largest, room, owner)

    def add(
        self, incoming: "Incoming", owner: str, filename: str, purpose: str, expires_at: int | None = None
    ) -> StoredFile:
        """Keep a file that is whole, of the owner for whom it was begun."""
        incoming.finish()
        file = incoming.described(owner, filename, purpose, expires_at)
        with incoming.keeping():
            self.database.add_file(file)
        return file

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Return an owner's file. Raises ObjectNotFound: another's is not there."""
        found = self.database.file(file_id)
        if found is None or found.owner != owner or _is_past(found):
            raise ObjectNotFound(f"No such File object: {file_id}", param="id")
        return found

    def list(
        self, owner: str, purpose: str | None, after: str | None, limit: int, *, ascending: bool
    ) -> list[StoredFile]:
        """Return some of an owner's files. Raises ObjectNotFound for an ``after`` that isn't his."""
        if after is not None:
            self.get(after, owner)
        now = int(time.time())
        return self.database.files(owner, purpose, after, limit, now, ascending=ascending)

    def path_of(self, file: StoredFile) -> Path:
        """Return where a file's content is."""
        return self._directory / "files" / file.id

    def delete(self, file_id: str, owner: str) -> None:
        """Delete an owner's file. Raises ObjectNotFound."""
        file = self.get(file_id, owner)
        self.database.delete_file(file.id)
        self.path_of(file).unlink(missing_ok=True)

    def take_input(self, file: StoredFile, batch_id: str) -> None:
        """Let a batch have its input for itself, for good. Raises ObjectNotFound: it was deleted meanwhile."""
        link = self.input_of(batch_id)
        with told_of_full_disks():
            try:
                os.link(self.path_of(file), link)
            except FileNotFoundError:
                raise ObjectNotFound(f"No such File object: {file.id}", param="id") from None
            sync(link.parent)

    def input_of(self, batch_id: str) -> Path:
        """Return where a batch reads."""
        return self._directory / "inputs" / batch_id

    def drop_input(self, batch_id: str) -> None:
        """Let go of a batch's input."""
        self.input_of(batch_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the table."""
        self.database.close()

    def _held(self) -> Counter[str]:
        """Return the bytes of all files by owner, and of those deleted that batches still read."""
        links, found = Counter[int](), dict[int, tuple[os.stat_result, str]]()
        for path in (self._directory / "inputs").iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                links[stat.st_ino] += 1
                found[stat.st_ino] = stat, path.name
        held = Counter(self.database.bytes_held())
        for inode, (stat, batch_id) in found.items():
            if stat.st_nlink <= links[inode]:
                batch = self.database.batch(batch_id)
                held["" if batch is None else batch.owner] += stat.st_size
        return held


class Incoming:
    """A file that is being written. ``finish`` or ``discard`` it; any thread may, while another still writes."""

    def __init__(self, directory: Path, file_id: str, largest: int, room: Room | None, owner: str) -> None:
        """``room``: of which it takes what it needs for its owner; None: all it wants."""
        self.id = file_id
        self._owner = owner
        self.nbytes = 0
        self._largest, self._room = largest, room
        self._lock = threading.RLock()
        self._is_kept = False
        self._taken = 0
        self._path, self._partial = directory / file_id, directory / f".{file_id}"
        with told_of_full_disks():
            self._file: BinaryIO = self._partial.open("wb")

    def write(self, data: bytes) -> None:
        """Append. Raises BodyTooLarge and StoreFull."""
        with self._lock:
            if self._file.closed:
                raise ValueError("the file is not being written any more")
            self.nbytes += len(data)
            if self.nbytes > self._largest:
                raise BodyTooLarge(f"the file is over the limit of {self._largest} bytes", param="file")
            if self._room is not None:
                self._room.take(len(data), self._owner)
                self._taken += len(data)
            with told_of_full_disks():
                self._file.write(data)

    def finish(self) -> None:
        """Have it be there for good, under its name."""
        with self._lock, told_of_full_disks():
            self._file.close()
            put_in_place(self._partial, self._path)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Let it be one of those kept from the block's end on: it isn't discarded any more."""
        room = self._room
        with (
            self._lock,
            contextlib.nullcontext() if room is None else room.keeping(self._taken, self._owner),
        ):
            yield
            self._is_kept = True

    def discard(self) -> None:
        """Delete it, unless it is kept."""
        with self._lock:
            if self._is_kept:
                return
            if self._room is not None:
                self._room.give_back(self._taken, self._owner)
                self._taken = 0
            with contextlib.suppress(OSError):
                self._file.close()
            for path in (self._partial, self._path):
                path.unlink(missing_ok=True)

    def described(self, owner: str, filename: str, purpose: str, expires_at: int | None) -> StoredFile:
        """Return what it is kept as."""
        name = filename[:LONGEST_NAME]
        return StoredFile(self.id, owner, int(time.time()), self.nbytes, name, purpose, expires_at)


@contextmanager
def told_of_full_disks() -> Iterator[None]:
    """Raise StoreFull for the system's word that there is no room."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull("the disk of files and batches is full; make room") from error
        raise


def _is_past(file: StoredFile) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()
