"""Who owns a directory of adapters: one process at a time. A reader of the registry needs no lock."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from manylora.adapters.errors import AdapterError, DirectoryInUse

LOCK_FILE = "owner"
_LONGEST_PID = 32


class DirectoryLock:
    """Holds a directory for this process until ``release`` or its end, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Take it. Raises DirectoryInUse with the pid of the process that has it, AdapterError if it can't be locked.

        The file stays when the lock is released: who deletes it could delete another's.
        """
        self._handle: int | None = os.open(
            directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._handle, _LONGEST_PID, 0).decode(errors="replace").strip() or "unknown"
            self.release()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise AdapterError(f"it can't be locked: {error.strerror}") from error
            raise DirectoryInUse(
                f"process {owner} serves this base from it; stop that one first, or give each server a data"
                " directory of its own"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk it is locked all the same, if not by name
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process have it; harmless if it is released already."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
