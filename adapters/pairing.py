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

REGISTRY_FILE = "registry.db"
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
        store = AdapterStore(directory / "adapters")
        mark = directory / _MARK
        before = _read(mark)
        if not start_anew:
            _check_known(registry, store, before)
        if before != registry.identity:
            write_whole(mark, f"{registry.identity}\n")
        undo.pop_all()
    return registry, store


def _check_known(registry: AdapterRegistry, store: AdapterStore, before: str | None) -> None:
    """Raise RegistryLost if the store holds files that this registry doesn't know, and that one before it knew.

    Files that nobody ever knew are what a crash left: the start sweeps them.
    """
    unknown = store.digests() - registry.digests_in_use()
    if unknown and _is_lost(registry, before):
        raise RegistryLost(
            f"the files of {len(unknown)} adapters are there, but the registry that says what they are is gone, emptied"
            f" or another one: put {REGISTRY_FILE} (and {REGISTRY_FILE}-wal) back, or start once with --start-anew,"
            " which deletes these files"
        )


def _is_lost(registry: AdapterRegistry, before: str | None) -> bool:
    """Say whether this is not the registry that was here before; None: no one wrote down which that was."""
    if registry.was_used():
        return registry.is_empty() or before not in (None, registry.identity)
    # What a crash during the very first registration leaves is known to be that only by the registry's identity.
    return before != registry.identity


def _read(mark: Path) -> str | None:
    try:
        return mark.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
