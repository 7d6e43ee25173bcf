"""From what a caller calls a source to the source: directories, the hub, object stores, web servers, if allowed."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.sources.allowed import (
    HUB,
    NOWHERE,
    OBJECTS,
    SCHEMES,
    Allowed,
    Place,
    parse_place,
    without_secrets,
)
from manylora.adapters.sources.archive import SUFFIXES
from manylora.adapters.sources.hub import hub_token, parse_hub, reading_hub
from manylora.adapters.sources.local import operator_source, resolve_source
from manylora.adapters.sources.objects import reading_objects
from manylora.adapters.sources.remote import RemoteSource
from manylora.adapters.sources.servers import reading_web
from manylora.adapters.sources.source import Source
from manylora.adapters.sources.web import USUAL, WebLimits

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
"""What may be a name on the hub, without its scheme."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A source as a caller names it; as a text, without what is secret in it."""

    src: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    """Of the request: for the hub, or for https."""
    source: Source | None = field(default=None, repr=False)
    """The source itself, if it is here already."""

    def __str__(self) -> str:
        """Return what may be shown, logged and stored: a URL without its query and its password."""
        scheme = _SCHEME.match(self.src)
        if scheme is None or scheme[1].lower() == "file":
            return self.src
        return without_secrets(self.src)


@dataclass(frozen=True, slots=True)
class Finding:
    """Where one kind of caller may find adapters. Settings of the server, and of a tenant what is narrower."""

    root: Path
    """Local directories must lie inside it."""
    trusted: frozenset[str] = frozenset()
    """Directories that the operator named; they may lie anywhere."""
    allowed: Allowed = NOWHERE
    limits: WebLimits = USUAL
    own_token: Callable[[], str | None] = hub_token
    """The token for the hub that is used where a request brings none."""

    def below(self, folder: str) -> "Finding":
        """Return where a tenant may: in its folder of the root and of each bucket, and with no token but its own."""
        return replace(
            self,
            root=self.root / folder,
            trusted=frozenset(),
            allowed=self.allowed.below(folder),
            own_token=lambda: None,
        )

    def find(self, offer: Offer) -> Source:
        """Return the source that is meant. Raises as Source.identify, and UnsupportedAdapter for other kinds."""
        if offer.source is not None:
            return offer.source
        src = offer.src
        scheme = _SCHEME.match(src)
        if scheme is None or scheme[1].lower() == "file":
            if offer.token is not None and not self._may_be_a_repository(src):
                raise InvalidAdapter(
                    "token: it goes with a source of the hub or of https://, not with a directory"
                )
            return self._local(offer)
        kind = scheme[1].lower()
        if kind not in SCHEMES:
            known = ", ".join(f"{each}://" for each in ("file", *SCHEMES))
            raise UnsupportedAdapter(f"{kind}:// sources are not served; give a path, or one of {known}")
        if kind == HUB:
            return self._hub(src[len(scheme[0]) :].lstrip("/"), offer.token)
        place = parse_place(src)
        self.allowed.check(place)
        return self._objects(place, offer.token) if kind in OBJECTS else self._web(place, offer.token)

    def _local(self, offer: Offer) -> Source:
        src = offer.src
        if src in self.trusted:
            return operator_source(Path(src))
        try:
            return resolve_source(src, self.root)
        except AdapterNotFound:
            if not self._may_be_a_repository(src):
                raise
        return self._hub(src, offer.token)

    def _may_be_a_repository(self, src: str) -> bool:
        return self.allowed.lists(HUB) and _REPOSITORY.fullmatch(src) is not None

    def _hub(self, name: str, token: str | None) -> Source:
        found = parse_hub(name)
        account, _, repo = found.repo.partition("/")
        self.allowed.check(Place(HUB, account, repo))
        token = token or self.own_token()
        start = partial(reading_hub, found, token, self.limits, self._passes)
        where = f"{HUB}://{name}"
        return RemoteSource(where, token, start, where)

    def _objects(self, place: Place, token: str | None) -> Source:
        if token is not None or place.query:
            raise InvalidAdapter(
                f"{place.scheme}:// is read with the rights of the server's environment: it takes no token and no query"
            )
        is_archive = _is_archive(place)
        return RemoteSource(
            str(place), None, partial(reading_objects, place, self.limits, is_archive), str(place), is_archive
        )

    def _web(self, place: Place, token: str | None) -> Source:
        is_archive = _is_archive(place)
        if place.query and not is_archive:
            raise InvalidAdapter(
                "a URL with a query names one file: give an archive's (.zip, .tar, .tar.gz), or a folder's without"
            )
        start = partial(reading_web, place, token, self.limits, self._passes, is_archive)
        return RemoteSource(place.url, token, start, str(place), is_archive)

    def _passes(self, place: Place) -> bool:
        return self.allowed.admits(place)


def _is_archive(place: Place) -> bool:
    return place.path.lower().endswith(SUFFIXES)
