"""Adapters' files by the hash of their contents: staged, then published in one rename, or not there at all.

    root/<digest>/        published, never written to again
    root/.staging/<…>/    being copied or deleted; whatever a crash leaves here is rubbish
    root/.derived/<digest>.<…>  what was computed of one; whatever is lost is computed again

Knows no names and no versions. All methods block and may be called from any thread.
"""

import contextlib
import errno
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.durable import sync
from manylora.adapters.errors import AdapterError, AdapterNotFound, InvalidAdapter, StoreFull
from manylora.adapters.files import Fingerprint, open_directory
from manylora.adapters.sources.source import Heard, Source, unheard
from manylora.adapters.sources.upload import Upload

_DIGEST = re.compile(r"[0-9a-f]{64}")
STAGING, DERIVED = ".staging", ".derived"
MOST_BYTES = 8 << 30
"""That an adapter's files may have together, unless somebody says otherwise."""
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """A private copy of an adapter's files, until it is published or discarded."""

    path: Path
    digest: str
    nbytes: int
    identity: Hashable = None
    """What its source says of having these files."""


class AdapterStore:
    """Content-addressed directories under ``root``, which is made if need be."""

    def __init__(self, root: Path, *, max_bytes: int = MOST_BYTES) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}
        """Of published files, as far as they were asked for."""
        self._verified: dict[str, Fingerprint] = {}
        """Of files that this process wrote or hashed: what is as it was then isn't hashed at every read."""
        self._publishing = threading.Lock()
        with as_store_full():
            (root / STAGING).mkdir(parents=True, exist_ok=True)

    @property
    def max_bytes(self) -> int:
        """The most that an adapter's files may have together."""
        return self._max_bytes

    def stage(self, source: Source, heard: Heard = unheard, max_bytes: int | None = None) -> StagedAdapter:
        """Have the known files of ``source`` copied here; ``heard`` is told how far that is.

        Raises what the source's ``fetch`` raises, or StoreFull, and then leaves nothing behind.
        """
        path = self._scratch()
        try:
            with as_store_full():
                copied = source.fetch(path, min(max_bytes or self._max_bytes, self._max_bytes), heard)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return StagedAdapter(path, copied.digest, copied.nbytes, copied.identity)

    def receive(self, max_bytes: int) -> Upload:
        """Return an upload that is written beside the staged copies. Raises StoreFull."""
        with as_store_full():
            return Upload(self._scratch(), max_bytes)

    def publish(self, staged: StagedAdapter) -> Path:
        """Move a staged copy to its place and return that; the copy is gone afterwards, whatever happens.

        If intact files of that digest are there already, those stay. Raises StoreFull.
        """
        target = self._root / staged.digest
        try:
            with self._publishing, as_store_full():
                if not self.is_intact(staged.digest):
                    self._put_aside(target)
                    self._sizes.pop(staged.digest, None)
                    staged.path.rename(target)
                    sync(self._root)
                    with open_directory(target, self._max_bytes) as files:
                        self._verified[staged.digest] = files.fingerprint
        finally:
            self.discard(staged)
        return target

    def discard(self, staged: StagedAdapter) -> None:
        """Delete a staged copy; no complaint if it is gone."""
        shutil.rmtree(staged.path, ignore_errors=True)

    def path_of(self, digest: str) -> Path:
        """Return where the files of ``digest`` are. Raises AdapterNotFound if they aren't."""
        path = self._root / _checked(digest)
        if not path.is_dir():
            raise AdapterNotFound(f"the store has no adapter with digest {digest}")
        return path

    def derived(self, digest: str, name: str) -> Path:
        """Return where what is computed of an adapter may be kept under a name, until the adapter's files go.

        The directory may have to be made.
        """
        return self._root / DERIVED / f"{_checked(digest)}.{name}"

    def nbytes(self, digest: str) -> int:
        """Return the bytes of the files of ``digest``; 0 if they aren't there. The disk is asked once."""
        known = self._sizes.get(digest)
        if known is not None:
            return known
        try:
            files = (path.stat() for path in (self._root / _checked(digest)).rglob("*") if path.is_file())
            nbytes = sum(found.st_size for found in files)
        except OSError:
            return 0
        if nbytes:
            self._sizes[digest] = nbytes
        return nbytes

    def verify(self, digest: str) -> Path:
        """Return where the files are, hashed if they changed since this process last did or never were.

        Raises AdapterNotFound or InvalidAdapter.
        """
        path = self.path_of(digest)
        try:
            with open_directory(path, self._max_bytes) as files:
                if self._verified.get(digest) == files.fingerprint:
                    return path
                found = files.read_through(lambda name: lambda chunk: None)
                if found == digest:
                    self._verified[digest] = files.fingerprint
        except AdapterError as error:
            raise _damaged(digest) from error
        if found != digest:
            raise _damaged(digest)
        return path

    def distrust(self, digest: str) -> None:
        """Hash the files of ``digest`` again before they are next called whole: they could not be read."""
        self._verified.pop(digest, None)

    def remove(self, digest: str) -> None:
        """Delete the files of ``digest``, if they are there. A crash leaves all of them or none."""
        with self._publishing:
            self.distrust(digest)
            self._sizes.pop(digest, None)
            self._put_aside(self._root / _checked(digest))
            self._remove_derived(lambda owner: owner == digest)

    def digests(self) -> frozenset[str]:
        """Return the digests of all published files."""
        return frozenset(path.name for path in self._root.iterdir() if _DIGEST.fullmatch(path.name))

    def sweep(self, keep: Collection[str]) -> int:
        """Delete what a crash left: staged copies, and digests that are not in ``keep``. Return how many.

        For start-up: a staging that is under way would be swept too.
        """
        leftovers = list((self._root / STAGING).iterdir())
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
        orphans = self.digests() - frozenset(keep)
        for digest in orphans:
            self.remove(digest)
        self._remove_derived(lambda owner: owner not in keep)
        return len(leftovers) + len(orphans)

    def is_intact(self, digest: str) -> bool:
        """Return whether files of ``digest`` are there and have that digest; hashes them as ``verify`` does."""
        try:
            self.verify(digest)
        except AdapterError:
            return False
        return True

    def _remove_derived(self, of: Callable[[str], bool]) -> None:
        """Delete what was derived of some adapters; what is half written belongs to none."""
        for path in (self._root / DERIVED).glob("*"):
            if of(path.name.partition(".")[0]):
                path.unlink(missing_ok=True)

    def _put_aside(self, path: Path) -> None:
        """Delete a directory by way of the staging area, so that no half of it is seen under its name."""
        scratch = self._scratch()
        try:
            path.rename(scratch)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in _OUT_OF_SPACE:
                raise
            # Not even a name finds room, and these files hold some. What a crash leaves of them is swept at the
            # next start, since no record is in use that has this digest.
            scratch = path
        shutil.rmtree(scratch, ignore_errors=True)

    def _scratch(self) -> Path:
        return self._root / STAGING / uuid.uuid4().hex


def is_digest(name: str) -> bool:
    """Return whether a directory of that name holds an adapter's files."""
    return _DIGEST.fullmatch(name) is not None


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise AdapterNotFound(f"{digest!r} is not a digest; expected 64 hex digits")
    return digest


def _damaged(digest: str) -> InvalidAdapter:
    return InvalidAdapter(f"the stored files {digest} are damaged; register the adapter again")


@contextlib.contextmanager
def as_store_full() -> Iterator[None]:
    """Turn what a full disk says into StoreFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise StoreFull("the disk of the adapter store is full; delete adapters or make room") from error
        raise
