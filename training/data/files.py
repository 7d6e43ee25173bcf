"""Reads rows from JSON, JSONL, CSV, Parquet and text files, one at a time: a file of any size takes little memory.

A row that can't be read is a row too, with its line and what is wrong with it; reading goes on behind it.
"""

import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from manylora.training.data.columns import Columns
from manylora.training.data.encoding import encoding_hint
from manylora.training.data.json_keys import Keys
from manylora.training.data.json_stream import read_json_values, too_much
from manylora.training.data.row import Row
from manylora.training.data.tables import MAX_LINE_BYTES, read_csv, read_parquet
from manylora.training.errors import InvalidData, reason_of

__all__ = ["DataPath", "Row", "data_fingerprint", "parse_data_path", "read_rows"]

KINDS: Mapping[str, str] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
MOST_TIMES = 1000
"""A file's rows are used. More is a slip of the pen that would fill the memory with row numbers."""


@dataclass(frozen=True, slots=True)
class DataPath:
    """A file and how much of it is used."""

    path: str
    share: float = 1.0
    """0.25: a quarter of the rows, drawn by the run's seed; 2: every row twice."""


def parse_data_path(text: str) -> DataPath:
    """Read ``file`` or ``file:share``. Raises InvalidData for a share that isn't above 0 and at most ``MOST_TIMES``."""
    path, colon, share = text.rpartition(":")
    if not colon or Path(text).exists():
        return DataPath(text)
    try:
        number = float(share)
    except ValueError:
        if Path(path).exists():
            raise InvalidData(f"{text}: {share!r} is no share; write file:0.5 or file:2") from None
        return DataPath(text)
    if not 0 < number <= MOST_TIMES:
        raise InvalidData(
            f"{text}: a share is a number above 0, at most {MOST_TIMES:,}, such as 0.5 (half the rows)"
            " or 2 (each twice)"
        )
    return DataPath(path, number)


def read_rows(path: str | Path, columns: Columns | None = None) -> Iterator[Row]:
    """Yield a file's rows in order; ``.gz`` behind a known ending is unpacked on the way.

    ``columns`` says which columns stand for which fields. Raises InvalidData for a file that isn't there, is of an
    unknown kind, or can't be read on at all.
    """
    rows = _read(Path(path))
    yield from rows if columns is None else map(columns.rename, rows)


def _read(path: Path) -> Iterator[Row]:
    kind = _kind(path)
    try:
        if kind == "parquet":
            yield from read_parquet(path)
            return
        with _open(path) as file:
            if kind == "json":
                yield from _read_json(file)
            elif kind == "jsonl":
                yield from _read_lines(file)
            elif kind == "csv":
                with _text(file) as text:
                    yield from read_csv(text, "\t" if ".tsv" in path.suffixes else ",", str(path))
            else:
                yield from _read_text(file)
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path}: isn't UTF-8{encoding_hint(error)}") from error
    except (OSError, EOFError) as error:
        raise InvalidData(f"{path}: can't be read: {reason_of(error)}") from error


def data_fingerprint(paths: Sequence[str]) -> dict[str, str]:
    """Return each file's SHA-256, in hex, by its name without share."""
    found = {}
    for text in paths:
        path = parse_data_path(text).path
        try:
            with Path(path).open("rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InvalidData(f"{path}: can't be read: {error.strerror}") from error
    return found


def _kind(path: Path) -> str:
    if not path.exists():
        raise InvalidData(f"{path}: there is no such file")
    if path.is_dir():
        raise InvalidData(f"{path}: is a directory; name its files")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise InvalidData(f"{path}: unknown kind of file; accepted are {', '.join(KINDS)}, also with .gz")
    return kind


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _text(file: BinaryIO) -> TextIO:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _read_json(file: BinaryIO) -> Iterator[Row]:
    """Read an array of rows; or values one behind the other, as JSON Lines in a .json file are."""
    with _text(file) as text:
        yield from read_json_values(text)


def _read_lines(file: BinaryIO) -> Iterator[Row]:
    keys = Keys()
    decoder = json.JSONDecoder(object_pairs_hook=keys)
    for number, line in _lines(file):
        keys.twice = None
        try:
            value = decoder.decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield Row(number, None, _not_utf8(error))
        except json.JSONDecodeError as error:
            yield Row(number, None, f"isn't JSON: {error.msg} at character {error.colno}")
        except (RecursionError, ValueError) as error:
            yield Row(number, None, f"isn't JSON that can be read: {too_much(error)}")
        else:
            twice = keys.error()
            yield Row.of(number, value) if twice is None else Row(number, None, twice)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"isn't UTF-8 at byte {error.start + 1}{encoding_hint(error)}"


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that aren't blank, with their numbers."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise InvalidData(
                f"line {number} is over {MAX_LINE_BYTES >> 20} MiB: this isn't a file of one row per line"
            )
        if not line.isspace():
            yield number, line


def _read_text(file: BinaryIO) -> Iterator[Row]:
    """Every line that isn't blank is an example."""
    for number, line in _lines(file):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield Row(number, None, _not_utf8(error))
        else:
            yield Row(number, {"text": text.rstrip("\r\n")}, None)
