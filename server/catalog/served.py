"""Which versions of which names are served at the moment, and who sees which of them. Lives on the event loop.

Changes of one name are made at once: between two of them every request finds the one or the other.
"""

import hashlib
from collections.abc import Iterator, MutableMapping
from copy import copy
from dataclasses import replace

from manylora.adapters.lineage import Lineage, listed_versions
from manylora.adapters.names import split_version, without_version
from manylora.adapters.records import AdapterRecord, AdapterState
from manylora.server.catalog.seen import Seen, Sees
from manylora.server.catalog.serving import Entry

_POINTS = 1 << 53


class Served:
    """Entries by name and version. Of each name one is active: what the name means."""

    def __init__(self) -> None:
        self.active: MutableMapping[str, Entry] = {}
        self._versions: dict[str, dict[int, Entry]] = {}
        self._sees: Sees = lambda name, version: True

    def seen_by(self, sees: Sees) -> "Served":
        """Return what is there for whoever may use only what ``sees`` lets through."""
        seen = copy(self)
        seen.active = Seen(self.active, lambda name, entry: sees(name, entry.record.version))
        seen._sees = sees
        return seen

    # What is asked

    def versions(self, name: str) -> tuple[Entry, ...]:
        """Return all versions of a name, the newest first; none: there is no such name."""
        found = self._versions.get(name, {})
        return tuple(found[version] for version in sorted(found, reverse=True) if self._sees(name, version))

    def version(self, name: str, version: int) -> Entry | None:
        """Return one version of a name."""
        return self._versions.get(name, {}).get(version) if self._sees(name, version) else None

    def find(self, text: str) -> Entry | None:
        """Return what ``text`` names: the active version of a name, or the one of ``name@2``."""
        entry = self.active.get(text)
        asked = None if entry is not None else split_version(text)
        return entry if asked is None else self.version(*asked)

    def other_versions(self, text: str) -> str | None:
        """Return what is said instead of a version that isn't there; None: ``text`` names none of what is there."""
        name = without_version(text)
        found = self.versions(name) if name != text else ()
        listed = listed_versions(entry.record.version for entry in found)
        return f"versions of {name!r}: {listed}" if found else None

    def canary(self, name: str) -> Entry | None:
        """Return the version that gets a share of a name's requests."""
        found = (each for each in self.versions(name) if each.record.state is AdapterState.CANARY)
        return next(found, None)

    def for_asker(self, entry: Entry, asker: str) -> Entry:
        """Return which version answers this asker: the active one, or a canary that can be served."""
        canary = self.canary(entry.record.name)
        if canary is None or canary.reason is not None or canary.record.share is None:
            return entry
        return canary if point_of(asker, entry.record.name) < canary.record.share else entry

    def lineage(self, name: str) -> Lineage | None:
        """Return a name's versions as the registry has them, whoever looks."""
        found = self._versions.get(name)
        return None if found is None else Lineage(tuple(each.record for each in found.values()))

    def names(self) -> tuple[str, ...]:
        """Return all names, whoever looks."""
        return tuple(self._versions)

    def everything(self) -> Iterator[Entry]:
        """Return every version of every name, whoever looks."""
        return (entry for versions in self._versions.values() for entry in versions.values())

    # Changes

    def follow(self, lineage: Lineage, *new: Entry) -> tuple[Entry, ...]:
        """Have a name mean what the registry says, with ``new`` for versions that come; return those that go."""
        name = lineage.active.name
        known = {**self._versions.get(name, {}), **{entry.record.version: entry for entry in new}}
        there = {record.version: _as(known[record.version], record) for record in lineage.records}
        self._versions[name] = there
        self.active[name] = there[lineage.active.version]
        return tuple(entry for version, entry in known.items() if version not in there)

    def forget(self, name: str) -> tuple[Entry, ...]:
        """Have a name mean nothing; return its versions."""
        del self.active[name]
        return tuple(self._versions.pop(name).values())

    def put_right(self, entry: Entry) -> None:
        """Have the active version of a name be this from now on: the same, as it is now."""
        record = entry.record
        self._versions[record.name][record.version] = entry
        self.active[record.name] = entry


def point_of(asker: str, name: str) -> float:
    """Return where an asker stands with a name, from 0 up to below 1: always the same place, another with each name."""
    digest = hashlib.sha256(f"{name}\0{asker}".encode(errors="backslashreplace")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / _POINTS


def _as(entry: Entry, record: AdapterRecord) -> Entry:
    return entry if entry.record == record else replace(entry, record=record)
