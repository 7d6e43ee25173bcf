"""Reads tables, CSV and Parquet, as rows."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from manylora.training.data.row import Row
from manylora.training.errors import InvalidData

if TYPE_CHECKING:
    import pyarrow as pa

Unfill = Callable[[Any], Any]
MAX_LINE_BYTES = 64 * 2**20
"""Of one line. Longer ones are no examples but a file of another kind."""
PARQUET_BATCH_ROWS = 256
_SEPARATORS: Mapping[str, str] = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_NAMED: Mapping[str, str] = {",": "name it .csv", "\t": "name it .tsv"}


def read_csv(file: TextIO, delimiter: str, name: str) -> Iterator[Row]:
    """Yield a table's rows under its header's names. Raises InvalidData where another separator was used."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield Row(line, None, f"isn't CSV: {error}")
            continue
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            _check_separator(header, delimiter, name)
            _check_names(header, name)
        elif len(fields) != len(header):
            yield Row(line, None, f"has {len(fields)} fields where the header has {len(header)}")
        else:
            yield Row(line, dict(zip(header, fields, strict=True)), None)


def _check_separator(header: list[str], delimiter: str, name: str) -> None:
    """Refuse a header that is one column with another separator in it: all of a row would be one field."""
    if len(header) > 1:
        return
    for other, called in _SEPARATORS.items():
        if other != delimiter and other in header[0]:
            to_do = _NAMED.get(other, f"write it with {_SEPARATORS[delimiter]}")
            raise InvalidData(
                f"{name}: its columns are separated by {called}, where {_SEPARATORS[delimiter]} are expected"
                f" (the header is {header[0]!r}): {to_do}"
            )


def _check_names(names: Sequence[str], file: str) -> None:
    """Refuse a table that has two columns of a name: one of them would be dropped unseen. Nameless ones may be many."""
    twice = next((name for name, times in Counter(names).items() if name and times > 1), None)
    if twice is not None:
        raise InvalidData(
            f"{file}: {names.count(twice)} columns are called {twice!r}: rename or remove all but one"
        )


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield a Parquet file's rows, without the nulls by which it fills structs up to all their fields."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            unfill = _unfilled(pa.struct(file.schema_arrow))
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield Row(number, unfill(row), None)
    except pa.ArrowException as error:
        raise InvalidData(f"{path}: isn't Parquet that can be read: {str(error).splitlines()[0]}") from error


def _unfilled(kind: "pa.DataType") -> Unfill:
    """Return what drops from a value what no row ever said: a struct's null fields, at any depth.

    All structs of a column have the same fields, null where a row had none. A map's keys are its own.
    """
    import pyarrow.types as types

    if types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        inner = {field.name: _unfilled(field.type) for field in fields}
        return lambda value: {name: inner[name](item) for name, item in value.items() if item is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _each(kind.value_type, lambda unfill, value: [unfill(item) for item in value])
    if types.is_map(kind):
        return _each(
            kind.item_type, lambda unfill, value: {name: unfill(item) for name, item in value.items()}
        )
    return _same


def _each(kind: "pa.DataType", rebuild: Callable[[Unfill, Any], Any]) -> Unfill:
    unfill = _unfilled(kind)
    if unfill is _same:
        return _same
    return lambda value: rebuild(lambda item: None if item is None else unfill(item), value)


def _same(value: Any) -> Any:
    return value
