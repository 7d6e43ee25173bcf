"""Holds a base's part of the data directory against itself, and sweeps what a crash left there.

``check`` changes nothing but the pid in the lock's file. ``mend`` does what the next start of a server would do.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from manylora.adapters.errors import AdapterError, RegistryNewer
from manylora.adapters.fsck.findings import Finding, fault, leftover, note
from manylora.adapters.fsck.rows import Rows, read_rows, wrong_rows
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.pairing import REGISTRY_FILE, STORE, check_known, known_registry, open_adapters
from manylora.adapters.store import DERIVED, STAGING, AdapterStore, is_digest

Progress = Callable[[int, int], None]
"""Called with how many of the stored adapters have been hashed, and how many there are."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a base's part of the data directory holds, and what is wrong with it."""

    directory: Path
    adapters: int
    """Names in service."""
    versions: int
    """Of all of them, in service."""
    mixtures: int
    stored: int
    """Sets of files."""
    nbytes: int
    intact: frozenset[str]
    """Digests whose files were hashed and are whole."""
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong, or not any more."""
        return all(each.level == "note" or each.repaired for each in self.findings)


def check(
    directory: Path, progress: Progress = lambda done, of: None, *, trusted: Collection[str] = ()
) -> Checked:
    """Look at everything. The files of ``trusted`` digests aren't hashed again.

    Raises DirectoryInUse, RegistryNewer and OSError.
    """
    lock = DirectoryLock(directory)
    try:
        return _check(directory, progress, trusted)
    finally:
        lock.release()


def mend(directory: Path, found: Checked) -> Checked:
    """Sweep what a crash left, look again, and return what was found with what of it is gone. Raises what check raises.

    Only where the registry is the one that knows the files: else they may be all that is left.
    """
    kinds = {(each.level, each.kind) for each in found.findings}
    if ("fault", "registry") in kinds or not any(level == "leftover" for level, _ in kinds):
        return found
    registry, store = open_adapters(directory)
    with registry:
        registry.drop_pending()
        store.sweep(registry.digests_in_use())
    left = check(directory, trusted=found.intact)
    there = set(left.findings)
    findings = tuple(replace(each, repaired=each not in there) for each in found.findings)
    return replace(left, intact=found.intact, findings=findings)


def _check(directory: Path, progress: Progress, trusted: Collection[str]) -> Checked:
    place = directory / STORE
    store = AdapterStore(place) if (place / STAGING).is_dir() else None
    stored = frozenset() if store is None else store.digests()
    findings = list(_strangers(place, stored))
    rows: Rows | None = None
    intact: frozenset[str] = frozenset()
    try:
        rows = _read(directory, stored)
    except RegistryNewer:
        raise
    except AdapterError as error:
        findings.append(fault("registry", REGISTRY_FILE, str(error)))
    if rows is not None:
        findings += wrong_rows(rows)
        intact, damaged = _examined(rows, store, stored, trusted, progress)
        findings += damaged
        orphans = sorted(stored - rows.digests_in_use)
        findings += [leftover("orphan", digest, "files that no adapter uses") for digest in orphans]
    nbytes = 0 if store is None else sum(map(store.nbytes, stored))
    counts = (0, 0, 0) if rows is None else (len(rows.names), len(rows.served), len(rows.mixtures))
    return Checked(directory, *counts, len(stored), nbytes, intact, tuple(findings))


def _read(directory: Path, stored: frozenset[str]) -> Rows | None:
    """Return what the registry says; None: there is none, and nothing that it would know. Raises AdapterError."""
    if not (directory / REGISTRY_FILE).is_file():
        if stored:
            raise AdapterError(
                f"the files of {len(stored)} adapters are there, and no registry that says what they are: put"
                f" {REGISTRY_FILE} (and {REGISTRY_FILE}-wal) back"
            )
        return None
    rows = read_rows(directory)
    unknown = len(stored - rows.digests_in_use)
    before = known_registry(directory)
    check_known(unknown, before, identity=rows.identity, was_used=rows.was_used, is_empty=rows.is_empty)
    return rows


def _examined(
    rows: Rows,
    store: AdapterStore | None,
    stored: frozenset[str],
    trusted: Collection[str],
    progress: Progress,
) -> tuple[frozenset[str], list[Finding]]:
    """Hash the files of all versions in service; return the digests that are whole, and what isn't."""
    users: dict[str, list[str]] = {}
    for row in rows.served:
        users.setdefault(row.digest, []).append(row.label)
    intact, findings = set(), []
    for number, (digest, labels) in enumerate(sorted(users.items()), 1):
        whose = ", ".join(labels)
        if store is None or digest not in stored:
            findings.append(fault("files", digest, f"the files of {whose} are gone: register it again"))
        elif digest in trusted or store.is_intact(digest):
            intact.add(digest)
        else:
            findings.append(fault("files", digest, f"the files of {whose} are damaged: register it again"))
        progress(number, len(users))
    return frozenset(intact), findings


def _strangers(place: Path, stored: frozenset[str]) -> Iterator[Finding]:
    """Yield what lies in the store and is no adapter's: what a crash left half made, and what nobody knows."""
    if not place.is_dir():
        return
    for path in sorted(place.iterdir()):
        if path.name == STAGING:
            for half in sorted(path.iterdir()):
                yield leftover(
                    "staging", half.name, "files that were being copied or deleted when a server ended"
                )
        elif path.name == DERIVED:
            for derived in sorted(path.iterdir()):
                if derived.name.partition(".")[0] not in stored:
                    yield leftover("derived", derived.name, "computed of files that are gone")
        elif not is_digest(path.name):
            yield note("stranger", path.name, f"no server puts such a thing into {place}; it is left alone")
