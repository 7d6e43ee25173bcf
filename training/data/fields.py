"""A row's fields: which of them were read, and which values count as text."""

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from manylora.training.data.example import Source
from manylora.training.data.json_keys import load_json
from manylora.training.errors import InvalidData


class Fields:
    """The fields of a row that aren't null: formats with a column for everything give every row every field."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = present(row)
        self._read: set[str] = set()
        self._notes: list[str] = []

    @property
    def row(self) -> Mapping[str, Any]:
        """The fields, to look at: nothing counts as read by that."""
        return self._row

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field, which then counts as read."""
        self._read.add(name)
        return self._row.get(name, default)

    def text(self, name: str, source: Source) -> str:
        """Take a text; "" where there is none. Raises InvalidData for what isn't text."""
        value = self.take(name, "")
        text = as_text(value)
        if text is None:
            raise InvalidData(f"{source}: {name} holds {kind_of(value)}; expected text")
        return text

    def not_read(self, name: str) -> None:
        """Note that something was passed over, though its field was read."""
        if name not in self._notes:
            self._notes.append(name)

    def unread(self) -> tuple[str, ...]:
        """Return the names of fields that hold something and weren't read, and what was noted."""
        names = (name for name, value in self._row.items() if name not in self._read and not _is_empty(value))
        return (*names, *self._notes)


def present(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields that aren't null."""
    return {name: value for name, value in row.items() if value is not None}


def is_textual(value: object) -> bool:
    """Whether a value stands where text belongs: a text, a number, or a truth value, which reading then refuses."""
    return isinstance(value, str | int | float | Decimal)


def as_text(value: object) -> str | None:
    """Return what counts as text: a string, and a number as JSON writes it; None for all else.

    true and false don't: whether "true", "True" or "yes" is to be learnt, nobody knows.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return None
    return json.dumps(value) if isinstance(value, float) else str(value)


def read_list(value: object, field: str, source: Source) -> Sequence[Any]:
    """Return a list that may be written as JSON text, as tables have it. Raises InvalidData."""
    if isinstance(value, str):
        try:
            value = load_json(value)
        except ValueError as error:
            said = getattr(error, "msg", "a number has too many digits")
            raise InvalidData(f"{source}: {field} is text that isn't JSON: {said}") from error
        except RecursionError as error:
            raise InvalidData(f"{source}: {field} is nested too deep") from error
    if not isinstance(value, list):
        raise InvalidData(f"{source}: {field} isn't a list")
    return value


def check_characters(value: object, source: Source) -> None:
    """Raise InvalidData where a text within ``value`` has half of a surrogate pair, which no tokenizer takes."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = f"U+{ord(value[error.start]):04X}"
                raise InvalidData(
                    f"{source}: a character is broken: {half} is half of a pair, such as an emoji's"
                ) from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_characters(name, source)
            check_characters(item, source)
    elif isinstance(value, list | tuple):
        for item in value:
            check_characters(item, source)


def kind_of(value: object) -> str:
    """Name a value's type for people."""
    if isinstance(value, bool):
        return "true or false"
    return "NaN or an infinity" if isinstance(value, float | Decimal) else type(value).__name__


def _is_empty(value: object) -> bool:
    return isinstance(value, str | list | tuple | dict) and not value
