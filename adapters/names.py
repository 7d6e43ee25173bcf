"""What an adapter or a mixture may be called, and how a message lists the names that exist. One rule for every door."""

import re
from collections.abc import Collection, Iterable

from manylora.adapters.errors import AdapterNameTaken, InvalidAdapter

MAX_NAME_LENGTH = 128
LISTED_NAMES = 20
LONGEST_ECHO = 200
"""Characters of a name or a text from a client that a message repeats."""
AUTO = "auto"
"""The model that a request names to have its prompt's own chosen: nothing else may be called so."""
_EXPORT = re.compile(r".*/export/export-[0-9a-f]{16}(/download)?")
"""What the HTTP API calls an adapter's exports: an adapter of such a name could not be told from one."""
_ROUTE = re.compile(r".*/(versions(/[0-9]+)?|rollback|canary(/promote)?)")
"""What the HTTP API calls what belongs to an adapter's versions."""
_VERSION = re.compile(r"(.+)@([1-9][0-9]{0,8})", re.A | re.S)
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
    if _ROUTE.fullmatch(name):
        raise InvalidAdapter(
            f"name {name!r} ends as a route of an adapter's versions does; choose another (what was registered so"
            " before goes by POST /v1/unload_lora_adapter)"
        )
    if name == AUTO:
        raise InvalidAdapter(
            f"name {name!r} is what requests ask for that leave the choice of the adapter to the server; choose another"
        )
    if name in reserved:
        raise InvalidAdapter(f"name {name!r} is the name of the base model; choose another")


def valid_name(name: str) -> bool:
    """Return whether anything may be called so."""
    try:
        check_name(name)
    except InvalidAdapter:
        return False
    return True


def with_version(name: str, version: int) -> str:
    """Return how one version of a name is asked for: ``sql@2``. No name holds an ``@``."""
    return f"{name}@{version}"


def split_version(text: str) -> tuple[str, int] | None:
    """Return the name and the version that ``text`` asks for; None: it names no version."""
    found = _VERSION.fullmatch(text)
    return None if found is None else (found[1], int(found[2]))


def without_version(text: str) -> str:
    """Return the name that ``text`` is of, whether it asks for a version or not."""
    asked = split_version(text)
    return text if asked is None else asked[0]


def list_names(names: Iterable[str]) -> str:
    """Return the names in order for a message: the first 20, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:LISTED_NAMES]) or "none"
    more = len(ordered) - LISTED_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def name_taken(name: str) -> AdapterNameTaken:
    """Return the error for a name that other weights have."""
    return AdapterNameTaken(f"adapter {name!r} exists with other weights; replace it or choose another name")
