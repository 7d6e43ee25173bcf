"""What is on the disk when a call returns, through a power cut too: the one place that knows what to sync, and when."""

import os
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
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)
