"""What may be done with adapters and mixtures: to the model, to a catalog in this process, and over HTTP."""

import random
from collections.abc import Awaitable
from dataclasses import dataclass
from urllib.parse import quote

from manylora.adapters.mixtures import MixturePart
from manylora.loadtest.checks.life.truth import Name, Parts, Refused, Truth
from manylora.server.catalog import AdapterCatalog

NAMES = ("a", "b", "team/c", "d:2")
MIXTURES = ("m", "n")
SHARES = (0.0, 0.3, 1.0)
WEIGHTS = (1.0, 0.5)
KINDS = {
    "register": 4,
    "put": 12,
    "delete": 3,
    "back": 8,
    "back to": 6,
    "try": 8,
    "try new": 8,
    "promote": 5,
    "abort": 4,
    "forget": 3,
    "mix": 6,
    "unmix": 2,
}
"""And how often each is done."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One change, of which each kind reads some fields."""

    kind: str
    name: str
    source: str = ""
    version: int = 0
    share: float = 0.0
    parts: Parts = ()

    def done_to(self, truth: Truth) -> Truth:
        """Return what is so afterwards. Raises Refused."""
        after = truth.copy()
        if self.kind in ("mix", "unmix"):
            self._mix(after)
        elif self.kind in ("register", "put"):
            self._put(after)
        elif self.kind == "delete":
            after.name(self.name)
            del after.names[self.name]
        else:
            self._change(after, after.name(self.name))
        return after

    def _mix(self, after: Truth) -> None:
        if self.kind == "unmix":
            if after.mixtures.pop(self.name, None) is None:
                raise Refused(404, "no mixture")
            return
        if self.name in after.names:
            raise Refused(409, "an adapter's name")
        if after.mixtures.get(self.name) != self.parts:
            after.meaning(self.parts)
            after.mixtures[self.name] = self.parts

    def _put(self, after: Truth) -> None:
        if self.name in after.mixtures:
            raise Refused(409, "a mixture's name")
        found = after.names.get(self.name)
        if found is not None and found.sources[found.active] == self.source:
            return
        if found is not None and self.kind == "register":
            raise Refused(409, "other weights")
        found = after.names.setdefault(self.name, Name())
        found.take_over(after.begin_version(self.name, self.source))
        found.trim(after.keep)

    def _change(self, after: Truth, found: Name) -> None:
        match self.kind:
            case "back" if found.canary is not None:
                found.end_canary()
            case "back" if len(found.pile) < 2:
                raise Refused(409, "nothing to go back to")
            case "back":
                found.pile.pop()
            case "back to":
                self._go_back_to(after, found)
            case "try new":
                self._try_source(after, found)
            case "try":
                self._try(after, self.version)
            case "forget":
                after.version(self.name, self.version)
                if self.version in (found.active, found.canary):
                    raise Refused(409, "it gets requests")
                found.drop(self.version)
            case _ if found.canary is None:
                raise Refused(409, "no canary")
            case "promote":
                found.take_over(found.canary)
            case "abort":
                found.end_canary()
        found.trim(after.keep)

    def _go_back_to(self, after: Truth, found: Name) -> None:
        after.version(self.name, self.version)
        if self.version == found.active:
            raise Refused(409, "active already")
        found.end_canary()
        if self.version in found.pile:
            del found.pile[found.pile.index(self.version) + 1 :]
        else:
            found.take_over(self.version)

    def _try(self, after: Truth, version: int) -> None:
        found = after.version(self.name, version)
        if version == found.active:
            raise Refused(409, "active already")
        found.canary, found.share = version, self.share

    def _try_source(self, after: Truth, found: Name) -> None:
        if found.canary is not None and found.sources[found.canary] == self.source:
            found.share = self.share
        elif found.sources[found.active] == self.source:
            raise Refused(409, "the active version's weights")
        else:
            self._try(after, after.begin_version(self.name, self.source))

    def done_in(self, catalog: AdapterCatalog) -> Awaitable[object]:
        """Do it to a catalog."""
        match self.kind:
            case "register":
                return catalog.register(self.name, self.source)
            case "put":
                return catalog.put(self.name, self.source)
            case "delete":
                return catalog.delete(self.name)
            case "back":
                return catalog.roll_back(self.name)
            case "back to":
                return catalog.roll_back(self.name, self.version)
            case "try":
                return catalog.try_version(self.name, self.version, self.share)
            case "try new":
                return catalog.try_source(self.name, self.source, self.share)
            case "promote":
                return catalog.promote(self.name)
            case "abort":
                return catalog.abort_canary(self.name)
            case "forget":
                return catalog.forget_version(self.name, self.version)
            case "mix":
                parts = [MixturePart(text, weight) for text, weight in self.parts]
                return catalog.put_mixture(self.name, parts)
        return catalog.delete_mixture(self.name)

    def request(self, truth: Truth) -> tuple[str, str, dict[str, object] | None]:
        """Return method, path and body that do it over HTTP; ``truth`` is what is so before."""
        path = f"/adapters/{quote(self.name, safe='/:')}"
        there = self.name in truth.names or self.name in truth.mixtures
        match self.kind:
            case "put" if self.name in truth.names:
                return "PUT", path, {"src": self.source}
            case "register" | "put":
                return "POST", "/adapters", {"name": self.name, "src": self.source}
            case "delete" | "unmix":
                return "DELETE", path, None
            case "back":
                return "POST", f"{path}/rollback", {}
            case "back to":
                return "POST", f"{path}/rollback", {"version": self.version}
            case "try":
                return "POST", f"{path}/canary", {"version": self.version, "share": self.share}
            case "try new":
                return "POST", f"{path}/canary", {"src": self.source, "share": self.share}
            case "promote":
                return "POST", f"{path}/canary/promote", None
            case "abort":
                return "DELETE", f"{path}/canary", None
            case "forget":
                return "DELETE", f"{path}/versions/{self.version}", None
        mixture = [{"adapter": text, "weight": weight} for text, weight in self.parts]
        if there:
            return "PUT", path, {"mixture": mixture}
        return "POST", "/adapters", {"name": self.name, "mixture": mixture}


def draw(rng: random.Random, truth: Truth, sources: tuple[str, ...]) -> Operation:
    """Return a random operation; most of them can be done."""
    [kind] = rng.choices(list(KINDS), list(KINDS.values()))
    if kind in ("mix", "unmix"):
        name = rng.choice(MIXTURES if rng.random() < 0.9 else NAMES)
        return Operation(kind, name, parts=draw_parts(rng, truth))
    name = rng.choice(NAMES if rng.random() < 0.95 else MIXTURES)
    if truth.names and kind not in ("register", "put") and rng.random() < 0.8:
        name = rng.choice(sorted(truth.names))
    version = rng.randint(1, truth.last.get(name, 0) + 1)
    if name in truth.names and rng.random() < 0.8:
        version = rng.choice(sorted(truth.names[name].sources))
    return Operation(kind, name, rng.choice(sources), version, rng.choice(SHARES))


def draw_parts(rng: random.Random, truth: Truth) -> Parts:
    """Return one to three random parts, mostly of what is there, some by their version."""
    names = rng.sample(NAMES, rng.randint(1, 3))
    if truth.names and rng.random() < 0.8:
        names = rng.sample(sorted(truth.names), min(len(names), len(truth.names)))
    found = []
    for name in names:
        versions = sorted(truth.names[name].sources) if name in truth.names else [1]
        text = f"{name}@{rng.choice(versions)}" if rng.random() < 0.4 else name
        found.append((text, rng.choice(WEIGHTS)))
    return tuple(found)
