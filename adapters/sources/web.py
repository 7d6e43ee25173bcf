"""Requests over HTTP to places that are allowed: bounded in time, redirects looked at one by one, secrets kept at home.

Proxies of the environment aren't used: what a name means is looked up and checked here (addresses.py).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urljoin

import httpcore

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, SourceForbidden, SourceUnreachable
from manylora.adapters.sources.addresses import CheckedBackend
from manylora.adapters.sources.allowed import WEB, Place, parse_place

MOST_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
"""For a connection, and for the next byte."""
AGENT = "manylora"
NOT_THERE = frozenset({"RepoNotFound", "RevisionNotFound", "EntryNotFound"})
"""What the hub calls its reason where the status tells too little."""
T = TypeVar("T")
Passes = Callable[[Place], bool]


class Interrupted(Exception):
    """A connection that couldn't be made or broke off, or a host that asks for patience. May be tried again."""


@dataclass(frozen=True, slots=True)
class WebLimits:
    """How long remote sources may take, and whom they may be read from."""

    seconds: float = 1800.0
    """For one adapter, all of it."""
    allow_private: bool = False
    pauses: tuple[float, ...] = (0.2, 1.0, 4.0)
    """Seconds before each further try of a connection that brought nothing."""


USUAL = WebLimits()


@dataclass(frozen=True, slots=True)
class Answer:
    """A head, and the body behind it."""

    status: int
    headers: Mapping[str, str]
    place: Place
    """Where it came from in the end."""
    body: Iterator[bytes]

    @property
    def length(self) -> int | None:
        """Bytes of the body, as its host claims; None: it doesn't."""
        claimed = self.headers.get("content-length", "")
        return int(claimed) if claimed.isascii() and claimed.isdigit() and len(claimed) < 20 else None


@dataclass(slots=True)
class Web:
    """Requests of one fetch: they share connections and the time that is left. Use it in ``with``."""

    limits: WebLimits
    passes: Passes
    """Says whether a redirect may lead there."""
    token: str | None = field(default=None, repr=False)
    """Sent to the host that is asked first, and to none that it redirects to."""
    _deadline: float = 0.0
    _pool: httpcore.ConnectionPool | None = None

    def __enter__(self) -> "Web":
        self._deadline = time.monotonic() + self.limits.seconds
        backend = CheckedBackend(allow_private=self.limits.allow_private)
        self._pool = httpcore.ConnectionPool(network_backend=backend, max_connections=2)
        return self

    def __exit__(self, *ignored: object) -> None:
        if self._pool is not None:
            self._pool.close()

    def patiently(self, work: Callable[[], T]) -> T:
        """Do some work again when it is Interrupted, a few times. Raises SourceUnreachable in the end."""
        for pause in self.limits.pauses:
            try:
                return work()
            except Interrupted:
                self.pause(pause)
        try:
            return work()
        except Interrupted as error:
            raise SourceUnreachable(f"{error}; try again") from None

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the time that is left. Raises SourceUnreachable when there is none."""
        time.sleep(min(seconds, self.check_time()))

    def check_time(self) -> float:
        """Return the seconds that are left. Raises SourceUnreachable when there are none."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise SourceUnreachable(
                f"the source took over {self.limits.seconds:g} seconds, which is what --source-timeout allows"
            )
        return left

    @contextlib.contextmanager
    def ask(self, method: str, place: Place, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """Send a request and follow its redirects. Raises Interrupted, SourceForbidden, SourceUnreachable."""
        first = place
        for _ in range(MOST_REDIRECTS + 1):
            own = {**(headers or {}), "user-agent": AGENT, "accept-encoding": "identity"}
            if self.token is not None and (place.scheme, place.host) == (first.scheme, first.host):
                own["authorization"] = f"Bearer {self.token}"
            with self._send(method, place, own) as answer:
                if answer.status not in REDIRECTS:
                    yield answer
                    return
                target = answer.headers.get("location", "")
            place = self._redirected(place, target)
        raise SourceUnreachable(f"{str(first)!r} redirects over {MOST_REDIRECTS} times")

    def _redirected(self, place: Place, target: str) -> Place:
        try:
            found = parse_place(urljoin(place.url, target.partition("#")[0]))
        except (InvalidAdapter, ValueError):
            raise SourceForbidden(f"{str(place)!r} redirects to what is no plain URL") from None
        if found.scheme not in WEB or (place.scheme == "https" and found.scheme != "https"):
            raise SourceForbidden(
                f"{str(place)!r} redirects to {found.scheme}://, which isn't followed from there"
            )
        if not self.passes(found):
            raise SourceForbidden(
                f"{str(place)!r} redirects to {found.host!r}, where this server may not read adapters from: whoever"
                " runs it lists places with --allow-source"
            )
        return found

    @contextlib.contextmanager
    def _send(self, method: str, place: Place, headers: Mapping[str, str]) -> Iterator[Answer]:
        assert self._pool is not None
        left = self.check_time()
        seconds = {"connect": min(CONNECT_SECONDS, left), "read": min(READ_SECONDS, left)}
        timeout = {**seconds, "write": seconds["read"], "pool": left}
        with (
            _told(place),
            self._pool.stream(
                method, place.url, headers=list(headers.items()), extensions={"timeout": timeout}
            ) as found,
        ):
            heads = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in found.headers}
            yield Answer(found.status, heads, place, self._timed(found.iter_stream()))

    def _timed(self, body: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in body:
            self.check_time()
            yield chunk


@contextlib.contextmanager
def _told(place: Place) -> Iterator[None]:
    """Tell of what httpcore raises as Interrupted. The rest of this project's errors pass."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
        kind = "takes too long" if isinstance(error, httpcore.TimeoutException) else "can't be read from"
        reason = str(error) or type(error).__name__
        raise Interrupted(f"{place.host!r} {kind}: {reason}") from None


def check_status(answer: Answer, asked: Place) -> None:
    """Raise AdapterNotFound, SourceForbidden, Interrupted or SourceUnreachable if that isn't what was asked for."""
    status, code = answer.status, answer.headers.get("x-error-code", "")
    if status in (200, 206):
        encoding = answer.headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise SourceUnreachable(
                f"{str(asked)!r} comes as {encoding[:40]!r}, though it was asked for as it is"
            )
    elif status in (404, 410) or code in NOT_THERE:
        raise AdapterNotFound(f"there is nothing at {str(asked)!r}{_hint(code)}")
    elif status in (401, 403):
        raise SourceForbidden(
            f"{answer.place.host!r} refuses {str(asked)!r} ({status}): give a token that may read it in the field"
            " token, or ask for access there"
        )
    elif status in (408, 425, 429) or status >= 500:
        raise Interrupted(f"{answer.place.host!r} answers {status}")
    else:
        raise SourceUnreachable(f"{answer.place.host!r} answers {status} for {str(asked)!r}")


def _hint(code: str) -> str:
    if code == "RepoNotFound":
        return "; if it is private, give a token that may read it in the field token"
    return " in that revision" if code == "RevisionNotFound" else ""
