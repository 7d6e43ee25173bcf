"""The registry's rows, read as they are from a copy of its file, and what they contradict: each other and themselves.

Not through the registry's own methods, which take for granted what is asked here.
"""

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from manylora.adapters.errors import AdapterError, InvalidMixture
from manylora.adapters.fsck.findings import Finding, fault, leftover, note
from manylora.adapters.mixtures import part_weight
from manylora.adapters.names import check_name
from manylora.adapters.pairing import REGISTRY_FILE
from manylora.adapters.registry import AdapterRegistry

SERVED = ("active", "canary", "kept")
STATES = ("pending", *SERVED, "retired")
_ADAPTERS = """SELECT a.id, a.name, a.version, a.digest, a.state, v.before, v.share
FROM adapters a LEFT JOIN versions v ON v.adapter = a.id ORDER BY a.name, a.version"""


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """One version of an adapter."""

    id: int
    name: str
    version: int
    digest: str
    state: str
    before: int | None
    """The version that it took over from."""
    share: float | None
    """A canary's."""

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Rows:
    """What a registry says."""

    identity: str
    was_used: bool
    adapters: tuple[AdapterRow, ...]
    """By name and version, retired ones too."""
    mixtures: tuple[tuple[str, str], ...]
    """Names of active ones, and their parts as JSON."""

    @property
    def served(self) -> tuple[AdapterRow, ...]:
        """Versions in service."""
        return tuple(row for row in self.adapters if row.state in SERVED)

    @property
    def digests_in_use(self) -> frozenset[str]:
        """Of files that must stay."""
        return frozenset(row.digest for row in self.adapters if row.state != "retired")

    @property
    def is_empty(self) -> bool:
        """Whether there is no row but those of attempts."""
        return all(row.state == "pending" for row in self.adapters)

    @property
    def names(self) -> frozenset[str]:
        """Names of adapters in service."""
        return frozenset(row.name for row in self.served)


def read_rows(directory: Path) -> Rows:
    """Return the rows of a directory's registry, whose lock the caller holds. Raises AdapterError and OSError."""
    with tempfile.TemporaryDirectory(prefix="manylora-fsck-") as room:
        copy = Path(room) / REGISTRY_FILE
        for suffix in ("", "-wal"):
            source = directory / f"{REGISTRY_FILE}{suffix}"
            if source.is_file():
                shutil.copyfile(source, copy.with_name(source.name))
        # Checks its pages, and gives it the tables of today.
        with AdapterRegistry(copy) as registry:
            identity, was_used = registry.identity, registry.was_used()
        with contextlib.closing(sqlite3.connect(copy)) as database:
            adapters = tuple(AdapterRow(*row) for row in database.execute(_ADAPTERS))
            mixtures = database.execute(
                "SELECT name, parts FROM mixtures WHERE state = 'active' ORDER BY name"
            )
            return Rows(identity, was_used, adapters, tuple(mixtures))


def wrong_rows(rows: Rows) -> Iterator[Finding]:
    """Yield what the rows contradict."""
    for name, found in groupby(rows.adapters, lambda row: row.name):
        yield from _wrong_name(name)
        yield from _wrong_versions(name, tuple(found))
    names = frozenset(name for name, _ in rows.mixtures)
    known = rows.names | {row.label for row in rows.served}
    for name, parts in rows.mixtures:
        yield from _wrong_name(name)
        if name in rows.names:
            yield fault("name", name, "an adapter and a mixture have this name: delete one of them")
        yield from _wrong_parts(name, parts, known, names)


def _wrong_name(name: str) -> Iterator[Finding]:
    try:
        check_name(name)
    except AdapterError as error:
        yield fault("name", name, str(error))


def _wrong_versions(name: str, rows: Sequence[AdapterRow]) -> Iterator[Finding]:
    for row in rows:
        if row.state not in STATES:
            yield fault("version", row.label, f"its state {row.state!r} is none")
        if row.state == "pending":
            yield leftover("pending", row.label, "a registration that a crash cut short")
    settled = Counter(row.version for row in rows if row.state != "pending")
    for version in (version for version, count in settled.items() if count > 1):
        yield fault("version", f"{name}@{version}", "several versions have this number")
    served = {row.version: row for row in rows if row.state in SERVED}
    states = Counter(row.state for row in served.values())
    if served and states["active"] != 1:
        yield fault("version", name, f"{states['active']} of its versions are active; one must be")
    if states["canary"] > 1:
        yield fault("version", name, f"{states['canary']} of its versions are canaries; one may be")
    for row in rows:
        yield from _wrong_version(row, served.keys())


def _wrong_version(row: AdapterRow, served: Collection[int]) -> Iterator[Finding]:
    if row.state not in SERVED:
        if row.before is not None or row.share is not None:
            yield fault(
                "version", row.label, "it isn't in service, and has a share or a way back all the same"
            )
        return
    if (row.state == "canary") != (row.share is not None):
        yield fault("version", row.label, f"it is {row.state}, and its share of the requests is {row.share}")
    elif row.share is not None and not 0 <= row.share <= 1:
        yield fault("version", row.label, f"its share of the requests is {row.share}, not from 0 to 1")
    if row.before is not None and (row.before not in served or row.before == row.version):
        yield fault("version", row.label, f"it took over from version {row.before}, which isn't in service")


def _wrong_parts(
    name: str, text: str, adapters: frozenset[str], mixtures: frozenset[str]
) -> Iterator[Finding]:
    try:
        parts = [(part["adapter"], part["weight"]) for part in json.loads(text)]
        for adapter, weight in parts:
            part_weight(adapter, weight)
    except (ValueError, TypeError, KeyError, InvalidMixture) as error:
        yield fault("mixture", name, f"its parts make no sense: {error}")
        return
    if not parts:
        yield fault("mixture", name, "it has no parts")
    for adapter, count in Counter(adapter for adapter, _ in parts).items():
        if count > 1:
            yield fault("mixture", name, f"part {adapter!r} is in it {count} times")
        if adapter in mixtures:
            yield fault("mixture", name, f"part {adapter!r} is a mixture")
        elif adapter not in adapters:
            yield note("mixture", name, f"it can't be served: part {adapter!r} isn't there")
