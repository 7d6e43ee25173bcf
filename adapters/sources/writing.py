"""Files of an adapter as they arrive in a folder of ours: made here alone, and on the disk when they are closed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def durable(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Make the file ``name`` of an adapter, and the folder that it may be in. Raises OSError, also if it is there."""
    path = folder / name
    if path.parent != folder:
        path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
