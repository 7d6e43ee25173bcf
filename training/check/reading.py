"""Reads data files row by row as examples, and never stops at a bad one."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from manylora.training.data.columns import Columns
from manylora.training.data.example import Example, Source
from manylora.training.data.files import parse_data_path, read_rows
from manylora.training.data.formats import (
    FORMATS,
    ROWS_LOOKED_AT,
    DataFormat,
    check_columns,
    format_named,
    recognise,
)
from manylora.training.data.row import Row
from manylora.training.errors import InvalidData


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file, what format it is in, and whether it is what a run is judged by."""

    path: str
    format: str
    evaluates: bool
    columns: Columns | None = None


def open_files(
    paths: Sequence[str],
    eval_paths: Sequence[str],
    format: str | None = None,
    columns: Columns | None = None,
) -> tuple[DataFile, ...]:
    """Recognise each file's format; shares behind a colon don't matter.

    Raises InvalidData for a file without rows, InvalidArgument for a format or a column that there isn't.
    """
    plain = [(parse_data_path(path).path, False) for path in paths]
    plain += [(parse_data_path(path).path, True) for path in eval_paths]
    check_columns(columns, [path for path, _ in plain])
    chosen = None if format is None else format_named(format).name
    return tuple(
        DataFile(path, chosen or usual_format(path, columns).name, evaluates, columns)
        for path, evaluates in plain
    )


def usual_format(path: str, columns: Columns | None = None) -> DataFormat:
    """The format that most of a file's first rows are in: unlike a run, a check goes on when some aren't."""
    votes: Counter[str] = Counter()
    for row in islice(read_rows(path, columns), ROWS_LOOKED_AT):
        found = [one.name for one in FORMATS if row.value is not None and one.matches(row.value)]
        votes.update(found[:1])
    if not votes:
        return recognise(path, columns)  # which says what is wrong
    name = votes.most_common(1)[0][0]
    return format_named("sharegpt" if name == "qwen" and votes["sharegpt"] else name)


def rows_of(files: Sequence[DataFile]) -> Iterator[tuple[int, int, Row]]:
    """Yield every row of every file: its number over all files, its file's number, and the row."""
    number = 0
    for index, file in enumerate(files):
        for row in read_rows(file.path, file.columns):
            yield number, index, row
            number += 1


def example_of(row: Row, file: DataFile) -> Example | str:
    """Read a row as an example, or say what is wrong with it (without its place)."""
    if row.value is None:
        return row.error or "can't be read"
    source = Source(file.path, row.line, row.number)
    try:
        return format_named(file.format).example(row.value, source)
    except InvalidData as error:
        return str(error).removeprefix(f"{source}: ")
