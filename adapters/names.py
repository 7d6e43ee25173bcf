"""What an adapter or a mixture may be called, and how a message lists the names that exist. One rule for every door."""

import re
from collections.abc import Collection, Iterable

from manylora.adapters.errors import AdapterNameTaken, InvalidAdapter

MAX_NAME_LENGTH = 128
LISTED_NAMES = 20
LONGEST_ECHO = 200
"""Characters of a name or a text from a client that a message repeats."""
_EXPORT = re.compile(r".*/export/export-[0-9a-f]{16}(/download)?")
"""What the HTTP API calls an adapter's exports: an adapter of such a name could not be told from one."""
_CHARACTERS = re.compile(r"[A-Za-z0-9._\-/:]+")


def check_name(name: str, *, reserved: Collection[str] = ()) -> None:
    """Raise InvalidAdapter unless ``name`` is 1 to 128 of ``A–Z a–z 0–9 . _ - / :`` and reads like no path.

    ``reserved`` are the names of the base, which nothing else may take.
    """
    if not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise InvalidAdapter(f"a name has 1 to {MAX_NAME_LENGTH} characters; this one has {len(name)}")
    if not _CHARACTERS.fullmatch(name):
        raise InvalidAdapter(f"name {name!r}: only letters, digits and . _ - / : are allowed")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidAdapter(f"name {name!r}: no part between slashes may be empty, '.' or '..'")
    if _EXPORT.fullmatch(name):
        raise InvalidAdapter(f"name {name!r} is what an export is called; choose another")
    if name in reserved:
        raise InvalidAdapter(f"name {name!r} is the name of the base model; choose another")


def valid_name(name: str) -> bool:
    """Return whether anything may be called so."""
    try:
        check_name(name)
    except InvalidAdapter:
        return False
    return True


def list_names(names: Iterable[str]) -> str:
    """Return the names in order for a message: the first 20, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:LISTED_NAMES]) or "none"
    more = len(ordered) - LISTED_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def name_taken(name: str) -> AdapterNameTaken:
    """Return the error for a name that other weights have."""
    return AdapterNameTaken(f"adapter {name!r} exists with other weights; replace it or choose another name")
