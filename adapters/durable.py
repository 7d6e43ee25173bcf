"""What is on the disk when a call returns, through a power cut too: the one place that knows what to sync, and when."""

import os
import stat
from pathlib import Path


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Put ``text`` in a file, in UTF-8: all of it or, if that is cut short, what was there before. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    put_in_place(partial, path)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a file that is closed to its name, there for good once this returns. Raises OSError."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def make_ordinary(path: Path) -> None:
    """Give a file the mode that open() would have given it: safetensors and temporary files are their owner's alone.

    What the mode is, umask and the directory's own rules say; a file made beside it shows it. Raises OSError.
    """
    shown = path.with_name(f".{path.name}.mode")
    handle = os.open(shown, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        path.chmod(stat.S_IMODE(os.fstat(handle).st_mode))
    finally:
        os.close(handle)
        shown.unlink(missing_ok=True)
