"""Keeps examples and their tokens in memory-mapped Arrow files, so that data of any size takes little memory."""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from manylora.training.data.example import Example, Source

ROWS_PER_BATCH = 512
_PREFIX = "manylora-data-"
_SECONDS_TO_LOCK = 60
"""A directory younger than that may be one whose maker hasn't locked it yet."""
_TOKENS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_EXAMPLES = pa.schema(
    [("content", pa.large_string()), ("file", pa.int32()), ("line", pa.int64()), ("row", pa.int64())]
)


class Directory:
    """A directory for the files of one data set, removed with the last object that holds it or at the program's end.

    What killed programs left is removed by the next: a living one holds a lock on its directory.
    """

    def __init__(self) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = (self.path / "lock").open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._finalizer = weakref.finalize(self, _remove, self.path, self._lock, os.getpid())


def _remove(path: Path, lock: BinaryIO, owner: int) -> None:
    lock.close()
    if os.getpid() == owner:  # data loaders' processes are copies of this one
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(place: Path) -> None:
    for path in place.glob(f"{_PREFIX}*"):
        try:
            if time.time() - path.stat().st_mtime < _SECONDS_TO_LOCK:
                continue
            with (path / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # in use, another user's, or gone meanwhile
            continue


class ArrowWriter:
    """Writes rows, some at a time, to a file that ``datasets`` reads."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, schema)
        self._columns: list[list[Any]] = [[] for _ in schema]

    def __enter__(self) -> "ArrowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        self._file.close()

    def write(self, *values: object) -> None:
        """Add a row."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        if len(self._columns[0]) >= ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        arrays = [
            pa.array(column, kind.type) for column, kind in zip(self._columns, self._schema, strict=True)
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._columns = [[] for _ in self._schema]


class ExampleStore:
    """Examples on disk, by number."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.has_system = False
        """Whether any example has a system turn."""
        self._path = directory.path / "examples.arrow"
        self._files: list[str] = []
        self._rows: Any = None
        self.fingerprints = array("Q")
        """64 bits of every example's content: equal contents have equal ones."""

    def fill(self, examples: Iterator[Example]) -> None:
        """Write down the examples. Called once."""
        from datasets import Dataset

        numbers: dict[str, int] = {}
        with ArrowWriter(self._path, _EXAMPLES) as writer:
            for example in examples:
                content = example.to_json()
                self.has_system = self.has_system or any(m["role"] == "system" for m in example.messages[:1])
                number = numbers.setdefault(example.source.path, len(numbers))
                writer.write(content, number, example.source.line, example.source.row)
                digest = blake2b(content.encode(), digest_size=8).digest()
                self.fingerprints.append(int.from_bytes(digest, "little"))
        self._files = list(numbers)
        self._rows = Dataset.from_file(str(self._path))

    def __len__(self) -> int:
        return len(self.fingerprints)

    def __getitem__(self, index: int) -> Example:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Read several examples."""
        rows = self._rows[list(indices)]
        return [
            Example.from_json(content, Source(self._files[file], line, row))
            for content, file, line, row in zip(*map(rows.get, _EXAMPLES.names), strict=True)
        ]


def tokens_writer(directory: Directory, name: str) -> ArrowWriter:
    """Begin a file of tokens and labels."""
    return ArrowWriter(directory.path / f"{name}.arrow", _TOKENS)


def open_tokens(directory: Directory, name: str) -> Any:
    """Open what ``tokens_writer`` wrote as a datasets.Dataset of lists."""
    from datasets import Dataset

    return Dataset.from_file(str(directory.path / f"{name}.arrow"))
