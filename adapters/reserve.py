"""A file that takes up space so that it can be given up when the disk is full: deleting must work then, too."""

import contextlib
import os
from pathlib import Path

_PAGE = 4096


class Reserve:
    """Space for the few pages that SQLite writes to delete a record."""

    def __init__(self, path: Path, nbytes: int = 128 << 10) -> None:
        self._path = path
        self._nbytes = nbytes

    def hold(self) -> None:
        """Take the space, or what can be had of it. Best effort: a full disk is no error here."""
        with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
            # Random bytes: a file system that compresses would keep nothing back for zeros. Page by page: on a disk
            # that is nearly full a part is worth holding.
            while (missing := self._nbytes - file.tell()) > 0:
                file.write(os.urandom(min(missing, _PAGE)))

    def give_up(self) -> bool:
        """Give the space back; False if none was held."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            return True
        return False
