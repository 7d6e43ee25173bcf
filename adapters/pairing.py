"""Opens a registry and a store that belong together: files whose registry is gone are not rubbish of a crash.

directory/owner         locked by the process that serves from here; its pid is in it
directory/registry.db   AdapterRegistry
directory/registry.id   identity of the registry that knows the store's files
directory/adapters/     AdapterStore
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from manylora.adapters.durable import write_whole
from manylora.adapters.errors import RegistryLost
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.store import AdapterStore

REGISTRY_FILE, STORE = "registry.db", "adapters"
_MARK = "registry.id"


def open_adapters(
    directory: Path, *, reserved: Sequence[str] = (), start_anew: bool = False
) -> tuple[AdapterRegistry, AdapterStore]:
    """Take ``directory``, which exists, for this process; closing the registry lets it go.

    Raises DirectoryInUse, RegistryLost, other AdapterErrors, and OSError.
    """
    with contextlib.ExitStack() as undo:
        lock = DirectoryLock(directory)
        undo.callback(lock.release)
        registry = AdapterRegistry(directory / REGISTRY_FILE, reserved=reserved, lock=lock)
        undo.callback(registry.close)
        store = AdapterStore(directory / STORE)
        before = known_registry(directory)
        if not start_anew:
            used, empty = registry.was_used(), registry.is_empty()
            unknown = len(store.digests() - registry.digests_in_use())
            check_known(unknown, before, identity=registry.identity, was_used=used, is_empty=empty)
        if before != registry.identity:
            write_whole(directory / _MARK, f"{registry.identity}\n")
        undo.pop_all()
    return registry, store


def check_known(unknown: int, before: str | None, *, identity: str, was_used: bool, is_empty: bool) -> None:
    """Raise RegistryLost if ``unknown`` sets of files aren't this registry's, and were known to one before it.

    ``before`` is what ``known_registry`` says. Files that nobody ever knew are what a crash left: a start sweeps them.
    """
    if unknown and _is_lost(before, identity, was_used=was_used, is_empty=is_empty):
        raise RegistryLost(
            f"the files of {unknown} adapters are there, but the registry that says what they are is gone, emptied"
            f" or another one: put {REGISTRY_FILE} (and {REGISTRY_FILE}-wal) back, or start once with --start-anew,"
            " which deletes these files"
        )


def _is_lost(before: str | None, identity: str, *, was_used: bool, is_empty: bool) -> bool:
    """Say whether this is not the registry that was here before; None: no one wrote down which that was."""
    if was_used:
        return is_empty or before not in (None, identity)
    # What a crash during the very first registration leaves is known to be that only by the registry's identity.
    return before != identity


def known_registry(directory: Path) -> str | None:
    """Return the identity of the registry that knows the store's files; None: no one wrote it down."""
    try:
        return (directory / _MARK).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
