"""What must be so: which versions names have, by the rules of docs/adapters.md alone. Knows nothing of the server.

Versions lead back like a pile: who takes over is put on top, going back takes off, and what is off the pile is kept
until there are too many.
"""

from copy import deepcopy
from dataclasses import dataclass, field


class Diverged(AssertionError):
    """What happened is not what must be so."""


def must(so: bool, otherwise: str) -> None:
    """Raise Diverged unless it is so."""
    if not so:
        raise Diverged(otherwise)


class Refused(Exception):
    """An operation must be refused; ``status`` is what HTTP says of it."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(slots=True)
class Name:
    """The versions of one name."""

    pile: list[int] = field(default_factory=list)
    """The way back; the active version is the last."""
    sources: dict[int, str] = field(default_factory=dict)
    """Where each version came from: all that are in service."""
    canary: int | None = None
    share: float = 0.0

    @property
    def active(self) -> int:
        """The version that the name means."""
        return self.pile[-1]

    def take_over(self, version: int) -> None:
        """Have a version be the active one, and the one before lead back to what was."""
        self.pile = [each for each in self.pile if each != version] + [version]
        self.canary = None

    def end_canary(self) -> None:
        """Keep the canary."""
        self.canary = None

    def trim(self, keep: int) -> None:
        """Let go what is too much: first what doesn't lead back, oldest first, then what leads back furthest."""
        kept = [each for each in self.sources if each not in (self.active, self.canary)]
        on_pile = [each for each in reversed(self.pile) if each in kept]
        off_pile = sorted((each for each in kept if each not in self.pile), reverse=True)
        for version in (on_pile + off_pile)[keep:]:
            self.drop(version)

    def drop(self, version: int) -> None:
        """Let one go."""
        del self.sources[version]
        self.pile = [each for each in self.pile if each != version]


Parts = tuple[tuple[str, float], ...]
"""Of a mixture: names, or names with a version, and weights."""


@dataclass(slots=True)
class Truth:
    """All names, and how many versions each ever had."""

    keep: int
    names: dict[str, Name] = field(default_factory=dict)
    mixtures: dict[str, Parts] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def copy(self) -> "Truth":
        """Return another one that says the same."""
        return deepcopy(self)

    def name(self, name: str) -> Name:
        """Return an adapter's versions. Raises Refused."""
        if name not in self.names:
            raise Refused(404, f"no adapter {name}")
        return self.names[name]

    def version(self, name: str, version: int) -> Name:
        """Return the versions of a name that has this one. Raises Refused."""
        found = self.name(name)
        if version not in found.sources:
            raise Refused(404, f"no version {version} of {name}")
        return found

    def part(self, text: str) -> tuple[str, int]:
        """Return which version a part means. Raises Refused."""
        name, _, version = text.partition("@")
        if text in self.mixtures:
            raise Refused(400, f"{text} is a mixture")
        found = self.names.get(name)
        if found is None or (version and int(version) not in found.sources):
            raise Refused(404, f"no part {text}")
        return name, int(version) if version else found.active

    def meaning(self, parts: Parts) -> list[tuple[str, int, float]]:
        """Return which versions a mixture is of, with their weights. Raises Refused."""
        found = [(*self.part(text), weight) for text, weight in parts]
        if len({each[:2] for each in found}) < len(found):
            raise Refused(400, "one version twice")
        return found

    def begin_version(self, name: str, source: str) -> int:
        """Note a new version of a name that is there."""
        version = self.last.get(name, 0) + 1
        self.last[name] = version
        self.names[name].sources[version] = source
        return version
