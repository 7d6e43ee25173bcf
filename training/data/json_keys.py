"""JSON whose objects give each key one value. What an object means that gives one two, JSON leaves open; Python would
take the last and say nothing."""

import json
from collections.abc import Sequence
from typing import Any


class TwoValues(ValueError):
    """A key that one object gives two values."""

    @property
    def msg(self) -> str:
        """What is wrong, where json's own errors have it."""
        return str(self)


class Keys:
    """For ``object_pairs_hook``: makes objects, and remembers the first key that one of them gave two values."""

    def __init__(self) -> None:
        self.twice: str | None = None

    def __call__(self, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """Return the object."""
        found = dict(pairs)
        if len(found) < len(pairs) and self.twice is None:
            self.twice = next((name for name, value in pairs if value != found[name]), None)
        return found

    def error(self) -> str | None:
        """Return what is wrong, if anything is."""
        return (
            None if self.twice is None else f"gives {self.twice!r} two values in one object; keep one of them"
        )


def load_json(text: str) -> Any:
    """Return the value that ``text`` is. Raises TwoValues, and what json.loads does."""
    keys = Keys()
    value = json.loads(text, object_pairs_hook=keys)
    if (error := keys.error()) is not None:
        raise TwoValues(error)
    return value
