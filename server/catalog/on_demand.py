"""Models that aren't registered, looked for when they are first asked for: once, however many ask at the same time.

Where they are looked for the operator says; who may have that done is the API's. Lives on the event loop.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.errors import AdapterError, AdapterNameTaken, AdapterNotFound, InvalidAdapter
from manylora.adapters.names import check_name
from manylora.adapters.sources.allowed import SCHEMES, Allowed
from manylora.adapters.sources.finding import Finding, Offer
from manylora.adapters.sources.web import WebLimits
from manylora.server.catalog.catalog import AdapterCatalog
from manylora.server.errors import AdapterUnavailable, ServerError

HOLE = "{name}"
MOST_AT_ONCE = 32
"""Names that are looked for at the same time."""
MOST_REMEMBERED = 4096
"""Names that weren't found, or can't be served, and aren't looked for again for a while."""
SECONDS_REMEMBERED = 10.0


@dataclass(frozen=True, slots=True)
class Resolver:
    """Where a name's adapter would be."""

    template: str
    """A source, with the hole where the name goes."""
    finding: Finding

    @classmethod
    def of(cls, where: str, limits: WebLimits) -> "Resolver":
        """Take a setting: a directory or a URL, with a hole or the name behind it. Raises ValueError."""
        template = where if HOLE in where else f"{where.rstrip('/')}/{HOLE}"
        before = template.partition(HOLE)[0].rpartition("/")[0]
        scheme, separator, _ = template.partition("://")
        if not separator:
            root = Path(before or "/").absolute()
            if template != f"{before}/{HOLE}" or not root.is_dir():
                raise ValueError(
                    f"{where!r} is no directory that is there; expected one, or a URL as hf://org/{HOLE}"
                )
            return cls(HOLE, Finding(root, limits=limits))
        if scheme.lower() not in SCHEMES or template.count(HOLE) != 1:
            raise ValueError(
                f"{where!r} is no place of adapters; expected one as hf://org/{HOLE}, or a directory"
            )
        listed = before if before.partition("://")[2] else f"{scheme}://"
        return cls(template, Finding(Path(), allowed=Allowed.of([listed]), limits=limits))

    def offer(self, name: str) -> Offer:
        """Return what a name's adapter would be registered from (blocking). Raises as Finding.find."""
        src = self.template.replace(HOLE, name)
        try:
            check_name(name)
            return Offer(src, source=self.finding.find(Offer(src)))
        except InvalidAdapter as error:
            raise AdapterNotFound(f"nothing is called {name!r} where models are looked for") from error


@dataclass(frozen=True, slots=True)
class _Refusal:
    until: float
    reason: str | None
    """Why it can't be served; None: it is nowhere."""


class OnDemand:
    """Looks for names, and remembers for a short while which were nowhere."""

    def __init__(
        self, resolver: Resolver, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``seconds`` is how long a request waits; ``clock`` tells seconds and goes only forward."""
        self._resolver = resolver
        self._seconds = seconds
        self._clock = clock
        self._under_way: dict[str, asyncio.Task[str | None]] = {}
        self._refusals: OrderedDict[str, _Refusal] = OrderedDict()

    async def look_for(self, catalog: AdapterCatalog, name: str) -> None:
        """Have ``catalog`` serve the adapter that a name stands for, if there is one; else change nothing.

        Raises AdapterUnavailable for one that is there and can't be served, or not within the time that requests wait.
        """
        self._forget_old()
        refusal = self._refusals.get(name)
        if refusal is not None:
            _raise_for(refusal.reason)
            return
        task = self._under_way.get(name)
        if task is None:
            if len(self._under_way) >= MOST_AT_ONCE:
                raise AdapterUnavailable(
                    f"{len(self._under_way)} models are being looked for already: try again",
                    param="model",
                    retry_after=1.0,
                )
            task = self._under_way[name] = catalog.in_background(self._look(catalog, name))
        done, _ = await asyncio.wait((task,), timeout=self._seconds)
        if not done:
            raise AdapterUnavailable(
                f"model {name!r} was asked for the first time and is being loaded, which takes over"
                f" {self._seconds:g} seconds: try again",
                param="model",
                retry_after=5.0,
            )
        _raise_for(task.result())

    async def _look(self, catalog: AdapterCatalog, name: str) -> str | None:
        """Do so; return why the adapter that is there can't be served."""
        reason: str | None = None
        try:
            offer = await asyncio.to_thread(self._resolver.offer, name)
            registration = catalog.registrations.open(name, str(offer))
            registration.caller.is_awaited = True
            await catalog.register(name, offer, registration=registration)
            return None
        except AdapterNameTaken:
            return None  # somebody registered it meanwhile
        except AdapterNotFound:
            pass
        except (AdapterError, ServerError) as refused:
            reason = f"model {name!r} can't be served: {refused}"
        finally:
            del self._under_way[name]
        self._refusals[name] = _Refusal(self._clock() + SECONDS_REMEMBERED, reason)
        while len(self._refusals) > MOST_REMEMBERED:
            self._refusals.popitem(last=False)
        return reason

    def _forget_old(self) -> None:
        """Drop what isn't remembered any more: the first is the oldest."""
        now = self._clock()
        while self._refusals and next(iter(self._refusals.values())).until <= now:
            self._refusals.popitem(last=False)


def _raise_for(reason: str | None) -> None:
    """Raise AdapterUnavailable if there is a reason, each time a new one: the door writes into what it answers with."""
    if reason is not None:
        raise AdapterUnavailable(reason, param="model")
