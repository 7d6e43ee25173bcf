"""The client's side of an upload: which files of a directory are sent, opened, as httpx takes them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from manylora.adapters.files import present_files

FIELD = "file"
"""The form's field for each file."""
Part = tuple[str, tuple[str, BinaryIO]]


@contextlib.contextmanager
def opened_parts(directory: Path, max_bytes: int = 1 << 40) -> Iterator[list[Part]]:
    """Open the adapter in ``directory`` for ``httpx.post(…, files=parts)``, which reads the files as it sends them.

    Raises AdapterNotFound, UnsupportedAdapter or InvalidAdapter for what no server would take, and OSError.
    """
    with contextlib.ExitStack() as files:
        yield [
            (FIELD, (name, files.enter_context((directory / name).open("rb"))))
            for name in present_files(directory, max_bytes)
        ]
