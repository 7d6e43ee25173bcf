"""What a backend made is opened by that backend alone."""

from typing import TypeVar

Own = TypeVar("Own")


def own(value: object, kind: type[Own]) -> Own:
    """Return ``value``, which must be a backend's ``kind``. Raises TypeError for what another backend made."""
    if not isinstance(value, kind):
        raise foreign(value)
    return value


def foreign(value: object) -> TypeError:
    """Return the error for what another backend made."""
    return TypeError(f"a {type(value).__name__} was made by another backend")
