"""What is kept of each row while a data set is checked: numbers in temporary files, and its text beside them.

In memory is only what is being looked at, so that a check of a million rows needs no more of it than one of a thousand.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manylora.training.check.shingles import BANDS, HASHES

_COLUMNS: Mapping[str, tuple[str, int]] = {
    "flags": ("u4", 0),
    "file": ("u2", 0),
    "line": ("u8", 0),
    "number": ("u8", 0),  # of the row in its file, where its line doesn't tell; else 0
    "row": ("u8", 0),  # hash of everything
    "loose": ("u8", 0),  # hash of the words of everything
    "prompt": ("u8", 0),  # hash of all before the answer; 0 without a prompt
    "answer": ("u8", 0),  # hash of the answer but for case, spaces and final marks
    "characters": ("u4", 0),
    "tokens": ("u4", 0),
    "language": ("u1", 0),
    "store": ("u2", 0),  # which text file
    "at": ("u8", 0),
    "size": ("u4", 0),
    "like": ("i8", 0),  # the row that this one repeats; -1 without
    "against": ("i8", 0),  # a row with the same prompt and another answer; -1 without
    "bands": ("u4", 2 * BANDS),
    "sketch": ("u1", 2 * HASHES),
}


@dataclass(frozen=True, slots=True)
class StoredText:
    """A row's text as it is in the table's files."""

    prompt: str
    answer: str
    error: str
    """Why there is no text."""


class RowTable:
    """Columns of numbers over all rows, in a directory; several processes may write different rows."""

    def __init__(self, directory: Path, rows: int, *, create: bool = False) -> None:
        """Open a table of `rows` rows, or make one."""
        self.directory, self.rows = directory, rows
        if create:
            for name, (kind, width) in _COLUMNS.items():
                with (directory / name).open("wb") as file:
                    file.truncate(max(rows, 1) * np.dtype(kind).itemsize * max(width, 1))
        self._stores: dict[int, int] = {}
        self._places: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None

    def column(self, name: str) -> NDArray[Any]:
        """Map one column, [rows] or [rows, width]. Drop the reference to give its memory back."""
        kind, width = _COLUMNS[name]
        shape = (self.rows, width) if width else (self.rows,)
        if not self.rows:
            return np.zeros(shape, dtype=kind)
        return np.memmap(self.directory / name, dtype=kind, mode="r+", shape=shape)

    def text(self, row: int) -> StoredText:
        """Read a row's text back."""
        if self._places is None:
            self._places = self.column("store"), self.column("at"), self.column("size")
        store, at, size = (int(column[row]) for column in self._places)
        if store not in self._stores:
            self._stores[store] = os.open(store_path(self.directory, store), os.O_RDONLY)
        raw = os.pread(self._stores[store], size, at).decode("utf-8", "surrogatepass")
        prompt, answer, error = raw.split("\x1f", 2)
        return StoredText(prompt, answer, error)

    def close(self) -> None:
        """Close the text files."""
        for descriptor in self._stores.values():
            os.close(descriptor)
        self._stores.clear()


def store_path(directory: Path, store: int) -> Path:
    """Where worker `store` keeps its rows' texts."""
    return directory / f"texts-{store}"


class TextWriter:
    """Appends texts to one worker's file."""

    def __init__(self, directory: Path, store: int) -> None:
        self._file = store_path(directory, store).open("wb")
        self.store = store
        self._at = 0

    def write(self, texts: Sequence[StoredText]) -> tuple[list[int], list[int]]:
        """Append; returns where each begins and how long it is, in bytes."""
        places, sizes = [], []
        for text in texts:
            fields = (text.prompt.replace("\x1f", " "), text.answer.replace("\x1f", " "), text.error)
            raw = "\x1f".join(fields).encode("utf-8", "surrogatepass")
            self._file.write(raw)
            places.append(self._at)
            sizes.append(len(raw))
            self._at += len(raw)
        return places, sizes

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
