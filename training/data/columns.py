"""--columns: fields that a file names otherwise."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from manylora.training.data.row import Row
from manylora.training.errors import InvalidArgument

FIELDS = (
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "messages",
    "conversations",
    "system",
    "tools",
    "text",
)
"""The names that formats know."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which of a file's columns stands for which field."""

    by_field: Mapping[str, str]
    """The file's name of a field, by ours."""

    @property
    def theirs(self) -> Iterable[str]:
        """The file's names."""
        return self.by_field.values()

    def rename(self, row: Row) -> Row:
        """Return a row under our names. A file without the columns, of several, stays as it is."""
        if row.value is None:
            return row
        found = {field: row.value[name] for field, name in self.by_field.items() if name in row.value}
        moved = {self.by_field[field] for field in found}
        rest = {name: value for name, value in row.value.items() if name not in moved}
        return Row(row.line, {**rest, **found}, None, row.number)


def parse_columns(text: str) -> Columns:
    """Read ``prompt=ticket,completion=label``, or the same as a JSON object. Raises InvalidArgument."""
    pairs = _pairs(text)
    by_field: dict[str, str] = {}
    for field, name in pairs:
        if field not in FIELDS:
            raise InvalidArgument(f"--columns {text}: {field!r} is no field; there are {', '.join(FIELDS)}")
        if field in by_field:
            raise InvalidArgument(f"--columns {text}: {field} is given twice")
        by_field[field] = name
    return Columns(by_field)


def _pairs(text: str) -> list[tuple[str, str]]:
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"--columns {text}: isn't JSON: {error}") from None
        return [(str(field), str(name)) for field, name in value.items()]
    pairs = []
    for part in text.split(","):
        field, equals, name = (piece.strip() for piece in part.partition("="))
        if not (field and equals and name):
            raise InvalidArgument(
                f"--columns {text}: expected FIELD=COLUMN,…, as in prompt=ticket,completion=label"
            )
        pairs.append((field, name))
    return pairs
