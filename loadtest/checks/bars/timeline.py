"""Which version of a name could answer when, as a client sees it: from when a change was asked for to its answer."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

ABSENT = None
Version = str | None
"""The source of a version's weights; ABSENT: the name doesn't exist."""


@dataclass(slots=True)
class _Era:
    version: Version
    begin: float
    """When the change to it was asked for: it may have begun at once."""
    end: float = math.inf
    """When the change away from it was confirmed: it may have lasted until then."""


@dataclass(slots=True)
class Timeline:
    """The versions of one name. Changes must not overlap."""

    _eras: list[_Era] = field(default_factory=lambda: [_Era(ABSENT, -math.inf)])

    @property
    def version(self) -> Version:
        """What the name has now, or is about to have."""
        return self._eras[-1].version

    def change(self, version: Version) -> "Change":
        """Note that a change is asked for; leave the ``with`` when it is confirmed."""
        return Change(self, version)

    def possible(self, begin: float, end: float) -> set[Version]:
        """Return what could answer a request that was resolved at some time between ``begin`` and ``end``."""
        return set(self._within(begin, end))

    def _within(self, begin: float, end: float) -> Iterator[Version]:
        for era in self._eras:
            if era.begin <= end and era.end >= begin:
                yield era.version


@dataclass(frozen=True, slots=True)
class Change:
    """A change under way."""

    timeline: Timeline
    version: Version

    def __enter__(self) -> None:
        self.timeline._eras.append(_Era(self.version, time.monotonic()))

    def __exit__(self, *_: object) -> None:
        self.timeline._eras[-2].end = time.monotonic()
