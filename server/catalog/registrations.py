"""Registrations as jobs: which are under way, how far they are, and for a while why they failed.

Knows no files and no engine: what is done is the catalog's operation, whose caller this is.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from manylora.adapters.errors import AdapterError
from manylora.adapters.names import LONGEST_ECHO
from manylora.server.catalog.operations import Caller, CallerLeft
from manylora.server.catalog.progress import Phase
from manylora.server.errors import QueueFull, RegistrationCancelled, ServerError

State = Phase | Literal["ready", "failed", "cancelled"]
MOST_UNDER_WAY, MOST_OF_A_TENANT = 64, 16
"""Registrations that nobody waits for and that are under way at the same time."""
MOST_FAILED = 256
"""Failed registrations that are told of: the oldest go first, of whoever has the most."""
KEPT_SECONDS = 3600.0
"""For how long one is told of."""


@dataclass(eq=False, slots=True)
class Registration:
    """One registration, from the request until it is over, and for a while after it failed."""

    name: str
    src: str
    """As it may be shown."""
    asked: str | None = None
    """A digest of all that was asked for, if nobody waits for the answer; None: somebody does."""
    tenant: str = ""
    """Who asked; "": who runs the server."""
    share: float | None = None
    """What a canary is to get of the requests; None: it is to answer all of them."""
    caller: Caller = field(default_factory=Caller)
    created: float = field(default_factory=time.time)
    ended: float | None = None
    error: Exception | None = None
    """A copy of what was raised, without its traceback: the frames of that hold the adapter's tensors."""
    is_cancelled: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it has ended, however."""

    @property
    def is_told(self) -> bool:
        """Whether its failure is kept: nobody waits for the answer."""
        return self.asked is not None

    @property
    def is_trial(self) -> bool:
        """Whether it is to be a canary."""
        return self.share is not None

    @property
    def state(self) -> State:
        """How far it is."""
        if self.ended is None:
            return "cancelled" if self.is_cancelled else self.caller.progress.phase
        if self.error is None:
            return "ready"
        return "cancelled" if self.is_cancelled else "failed"

    @property
    def bytes(self) -> tuple[int, int | None]:
        """Return how many bytes have come, and of how many."""
        return self.caller.progress.done, self.caller.progress.total


class Registrations:
    """All that are under way, and the failed ones that are told of. Lives on the event loop."""

    def __init__(self) -> None:
        self._running: dict[str, list[Registration]] = {}
        self._failed: OrderedDict[str, Registration] = OrderedDict()

    def open(
        self,
        name: str,
        src: str,
        *,
        asked: str | None = None,
        tenant: str = "",
        share: float | None = None,
    ) -> Registration:
        """Note a registration that is to be done within ``running``.

        Raises QueueFull for one that nobody waits for while too many such are under way.
        """
        if asked is not None:
            self._check_room(tenant)
        registration = Registration(name, src, asked, tenant, share)
        self._running.setdefault(name, []).append(registration)
        self._failed.pop(name, None)
        return registration

    @contextmanager
    def running(self, registration: Registration) -> Iterator[None]:
        """Do it in the ``with``: how it ends is noted. Raises RegistrationCancelled where it was cancelled."""
        try:
            yield
        except CallerLeft as error:
            registration.error = _bare(error)
            if registration.is_cancelled:
                raise RegistrationCancelled(
                    f"the registration of {registration.name[:LONGEST_ECHO]!r} was cancelled by a DELETE"
                ) from None
            raise
        except BaseException as error:
            registration.error = _bare(error)
            raise
        finally:
            self._end(registration)

    def under_way(self, name: str) -> Registration | None:
        """Return the last registration of that name that is being done."""
        running = self._running.get(name)
        return running[-1] if running else None

    def same(self, name: str, asked: str) -> Registration | None:
        """Return the one that does what is asked already, and for nobody who may hang up."""
        running = self._running.get(name, ())
        return next((each for each in running if each.asked == asked and not each.is_cancelled), None)

    def of(self, name: str) -> Registration | None:
        """Return the last registration of that name that is being done, or failed not long ago."""
        self._forget_old()
        return self.under_way(name) or self._failed.get(name)

    def all(self) -> list[Registration]:
        """Return those that are being done, the last of each name, and those that failed."""
        self._forget_old()
        return [running[-1] for running in self._running.values()] + list(self._failed.values())

    def cancel(self, name: str) -> list[Registration]:
        """Have all registrations of a name end before they take effect, if they still can; return them."""
        return _cancelled(self._running.get(name, ()))

    def cancel_trials(self, name: str) -> list[Registration]:
        """Have those of them end alone that are to be canaries."""
        return _cancelled(each for each in self._running.get(name, ()) if each.is_trial)

    def forget(self, name: str) -> Registration | None:
        """Tell no more of a failed one; return it."""
        return self._failed.pop(name, None)

    def end_downloads(self) -> None:
        """Have those end that nobody knows how long they would take: the server closes."""
        for running in self._running.values():
            for registration in running:
                progress = registration.caller.progress
                if progress.is_remote and progress.phase in ("waiting", "downloading"):
                    registration.caller.leave()

    def _end(self, registration: Registration) -> None:
        registration.ended = time.time()
        registration.over.set()
        running = self._running[registration.name]
        running.remove(registration)
        if not running:
            del self._running[registration.name]
        failed = self._failed.get(registration.name)
        if registration.error is None and failed is not None and failed.created <= registration.created:
            del self._failed[registration.name]  # what was asked for later is served
        if registration.error is not None and registration.is_told and not registration.is_cancelled:
            self._failed.pop(registration.name, None)
            self._failed[registration.name] = registration
            while len(self._failed) > MOST_FAILED:
                self._forget_one()

    def _check_room(self, tenant: str) -> None:
        told = [each.tenant for running in self._running.values() for each in running if each.is_told]
        if len(told) >= MOST_UNDER_WAY or (tenant and told.count(tenant) >= MOST_OF_A_TENANT):
            raise QueueFull(
                "too many adapters are being registered with wait=false: try again when one is through",
                retry_after=5.0,
            )

    def _forget_one(self) -> None:
        """Drop the oldest of whoever has the most: nobody's failures push out those of others who have fewer."""
        most = Counter(each.tenant for each in self._failed.values()).most_common(1)[0][0]
        del self._failed[next(name for name, each in self._failed.items() if each.tenant == most)]

    def _forget_old(self) -> None:
        before = time.time() - KEPT_SECONDS
        for name in [name for name, each in self._failed.items() if (each.ended or 0.0) < before]:
            del self._failed[name]


def _cancelled(running: Iterable[Registration]) -> list[Registration]:
    found = list(running)
    for registration in found:
        registration.is_cancelled = True
        registration.caller.leave()
    return found


def _bare(error: BaseException) -> Exception:
    """Return an error that says the same; of one that nobody expected, its name alone: no more of it is told."""
    if not isinstance(error, AdapterError | ServerError):
        return RuntimeError(type(error).__name__)
    kind = type(error)
    bare = kind.__new__(kind, *error.args)
    bare.__dict__.update(vars(error))
    return bare
