"""The versions of one name that are in service, and what a change makes of them. Pure: who keeps them is elsewhere.

One is active; one may be a canary, which gets a share of the requests; the others are kept, to be asked for as
``name@2`` or gone back to. Each knows which one it took over from: the way back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from manylora.adapters.errors import InvalidAdapter, UnknownVersion, VersionConflict
from manylora.adapters.records import AdapterRecord, AdapterState


@dataclass(frozen=True, slots=True)
class Lineage:
    """A name's versions. Methods return another one; those that raise say what is wrong with the change."""

    records: tuple[AdapterRecord, ...]
    """In any order; exactly one is active, at most one a canary."""

    @property
    def active(self) -> AdapterRecord:
        """The one that requests for the name get."""
        return next(each for each in self.records if each.state is AdapterState.ACTIVE)

    @property
    def canary(self) -> AdapterRecord | None:
        """The one that gets a share of these requests."""
        return next((each for each in self.records if each.state is AdapterState.CANARY), None)

    def newest_first(self) -> tuple[AdapterRecord, ...]:
        """Return all of them, the highest number first."""
        return tuple(sorted(self.records, key=lambda each: -each.version))

    def get(self, version: int) -> AdapterRecord:
        """Return one of them. Raises UnknownVersion with those that there are."""
        found = self._find(version)
        if found is None:
            raise unknown_version(self.active.name, version, (each.version for each in self.records))
        return found

    def way_back(self) -> tuple[int, ...]:
        """Return the active version and those before it, as each took over from the next."""
        found: list[int] = []
        step: AdapterRecord | None = self.active
        while step is not None and step.version not in found:
            found.append(step.version)
            step = None if step.before is None else self._find(step.before)
        return tuple(found)

    def before(self) -> AdapterRecord:
        """Return the one that the active version took over from. Raises VersionConflict if none is kept."""
        back = self.way_back()
        if len(back) < 2:
            others = [each.version for each in self.newest_first() if each is not self.active]
            told = f"; kept are {listed_versions(others)}: name one of them" if others else ""
            raise VersionConflict(
                f"{self.active.name!r} has no version to go back to: of those before version"
                f" {self.active.version} none is kept{told}"
            )
        return self.get(back[1])

    # Changes

    def joined_by(self, record: AdapterRecord) -> "Lineage":
        """Return them with a new version, which is kept so far."""
        return Lineage((*self.records, replace(record, state=AdapterState.KEPT, before=None, share=None)))

    def led_by(self, version: int, *, like: AdapterRecord) -> "Lineage":
        """Return them with that version as the active one, which takes over; a canary is over.

        It is pinned and preloaded as ``like`` is. The one that was active is the one to go back to.
        """
        old = self.active
        if version == old.version:
            raise VersionConflict(f"version {version} of {old.name!r} is the active one already")
        self.get(version)
        return self._led(version, like)

    def back_to(self, version: int) -> "Lineage":
        """Return them with that version as the active one again, kept as the active one was; a canary is over.

        On the way back the way before it stays what it was; any other version takes over.
        """
        old = self.active
        found = self.get(version)
        if version == old.version:
            raise VersionConflict(f"version {version} of {old.name!r} is the active one already")
        if version not in self.way_back():
            return self.led_by(version, like=old)
        return self.without_canary()._with(_resting(old), _in_force(found, old))

    def trying(self, version: int, share: float) -> "Lineage":
        """Return them with that version as the canary, in the place of another.

        Raises InvalidAdapter for a share that is none, VersionConflict for the active version.
        """
        if not 0 <= share <= 1:
            raise InvalidAdapter(
                f"share is {share}: a canary's share of the requests is a number from 0 to 1"
            )
        found = self.get(version)
        if found.state is AdapterState.ACTIVE:
            raise VersionConflict(
                f"version {version} of {found.name!r} is the active one: it gets what the canary doesn't"
            )
        return self.without_canary()._with(replace(found, state=AdapterState.CANARY, share=share))

    def promoted(self) -> "Lineage":
        """Return them with the canary as the active one, kept as that was. Raises VersionConflict without a canary."""
        old = self.active
        return self.led_by(self._the_canary().version, like=old)

    def aborted(self) -> "Lineage":
        """Return them with the canary kept, and no more. Raises VersionConflict without a canary."""
        self._the_canary()
        return self.without_canary()

    def without_canary(self) -> "Lineage":
        """Return them with the canary kept, if there is one."""
        canary = self.canary
        return self if canary is None else self._with(replace(canary, state=AdapterState.KEPT, share=None))

    def without(self, version: int) -> "Lineage":
        """Return them without a kept version. Raises UnknownVersion, and VersionConflict for one that gets requests."""
        found = self.get(version)
        if found.state is AdapterState.ACTIVE:
            raise VersionConflict(
                f"version {version} of {found.name!r} is the active one: go back to another first, or delete the name"
            )
        if found.state is AdapterState.CANARY:
            raise VersionConflict(f"version {version} of {found.name!r} is the canary: end that first")
        return self._dropping(version)

    def trimmed(self, keep: int) -> "Lineage":
        """Return them with at most ``keep`` kept ones: those nearest on the way back, then the newest."""
        back = self.way_back()
        kept = [each for each in self.records if each.state is AdapterState.KEPT]

        def last_to_go(record: AdapterRecord) -> tuple[int, int]:
            place = back.index(record.version) if record.version in back else len(back)
            return place, -record.version

        found = self
        for record in sorted(kept, key=last_to_go)[keep:]:
            found = found._dropping(record.version)
        return found

    def _find(self, version: int) -> AdapterRecord | None:
        return next((each for each in self.records if each.version == version), None)

    def _the_canary(self) -> AdapterRecord:
        if self.canary is None:
            raise VersionConflict(f"{self.active.name!r} has no canary")
        return self.canary

    def _led(self, version: int, like: AdapterRecord) -> "Lineage":
        moved = self._unlinked(version).without_canary()
        old = moved.active
        new = replace(moved.get(version), before=old.version)
        return moved._with(_resting(old), _in_force(new, like))

    def _unlinked(self, version: int) -> "Lineage":
        """Return them with the way back leading past a version."""
        gone = self.get(version)
        return self._with(
            *(replace(each, before=gone.before) for each in self.records if each.before == version)
        )

    def _dropping(self, version: int) -> "Lineage":
        return Lineage(tuple(each for each in self._unlinked(version).records if each.version != version))

    def _with(self, *changed: AdapterRecord) -> "Lineage":
        new = {each.version: each for each in changed}
        return Lineage(tuple(new.get(each.version, each) for each in self.records))


def _in_force(record: AdapterRecord, like: AdapterRecord) -> AdapterRecord:
    as_kept = replace(record, pinned=like.pinned, preload=like.preload)
    return replace(as_kept, state=AdapterState.ACTIVE, share=None)


def _resting(record: AdapterRecord) -> AdapterRecord:
    return replace(record, state=AdapterState.KEPT, pinned=False, preload=False)


def unknown_version(name: str, version: int, versions: Iterable[int]) -> UnknownVersion:
    """Return the error for a version that isn't there."""
    return UnknownVersion(f"there is no version {version} of {name!r}; versions: {listed_versions(versions)}")


def listed_versions(versions: Iterable[int]) -> str:
    """Return the numbers for a message, the highest first: 20 of them, and how many more there are."""
    ordered = sorted(versions, reverse=True)
    shown = ", ".join(map(str, ordered[:20])) or "none"
    return shown if len(ordered) <= 20 else f"{shown} and {len(ordered) - 20} more"
