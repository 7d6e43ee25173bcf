"""A file that takes up space so that it can be given up when the disk is full: deleting must work then, too."""

import contextlib
import os
from pathlib import Path


class Reserve:
    """Space for the few pages that SQLite writes to delete a record."""

    def __init__(self, path: Path, nbytes: int = 128 << 10) -> None:
        self._path = path
        self._nbytes = nbytes

    def hold(self) -> None:
        """Take the space, if it isn't held and can be had. Best effort: a full disk is no error here."""
        try:
            if self._path.stat().st_size == self._nbytes:
                return
        except FileNotFoundError:
            pass
        try:
            # Random bytes: a file system that compresses would keep nothing back for zeros.
            self._path.write_bytes(os.urandom(self._nbytes))
        except OSError:
            self.give_up()

    def give_up(self) -> bool:
        """Give the space back; False if none was held."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            return True
        return False
