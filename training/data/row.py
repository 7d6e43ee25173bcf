"""A row of a data file, before anything is known of its format."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One row, or what is wrong with it. Exactly one of ``value`` and ``error`` is set."""

    line: int
    """The line on which it begins, from 1; in Parquet the row's number."""
    value: Mapping[str, Any] | None
    error: str | None
    number: int | None = None
    """Which row of the file it is, from 1, where the line doesn't tell: another one begins on it too."""

    @classmethod
    def of(cls, line: int, value: object, number: int | None = None) -> "Row":
        """Wrap a decoded JSON value; anything but an object is an error."""
        if isinstance(value, dict):
            return cls(line, value, None, number)
        return cls(line, None, f"is {_KINDS.get(type(value), 'no object')}; expected an object", number)


_KINDS: Mapping[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
