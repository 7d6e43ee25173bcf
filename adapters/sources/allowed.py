"""Which places beyond this machine adapters may come from: what the operator listed, by scheme, host and path.

A listed ``https://host/models/`` lets through what lies below it and nothing beside it; ``hf://`` is the whole hub and
``hf://org`` what one account has. With nothing listed, nothing is let through.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from manylora.adapters.errors import InvalidAdapter, SourceForbidden

WEB = ("https", "http")
OBJECTS = ("s3", "gs", "az")
HUB = "hf"
SCHEMES = (HUB, *OBJECTS, *WEB)
LONGEST_URL = 2000
_ODD = re.compile(r"[\x00-\x20\x7f-\U0010ffff\\]")
_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True, slots=True)
class Place:
    """A URL taken apart and made comparable."""

    scheme: str
    host: str
    """With its port, if it isn't the scheme's own; of an object store the bucket, of the hub an account."""
    path: str
    """Parts after the host, joined by slashes; "" or not ending in one."""
    query: str = ""

    def __str__(self) -> str:
        """Return the URL without its query, which may be a secret."""
        return f"{self.scheme}://{self.host}{'/' if self.path else ''}{self.path}"

    @property
    def url(self) -> str:
        """The whole URL."""
        return f"{self}{'?' if self.query else ''}{self.query}"

    def contains(self, other: "Place") -> bool:
        """Return whether ``other`` is this or lies below it."""
        if self.scheme != other.scheme:
            return False
        if not self.host:
            return True
        below = not self.path or other.path == self.path or other.path.startswith(f"{self.path}/")
        return self.host == other.host and below


def parse_place(url: str) -> Place:
    """Take a URL apart. Raises InvalidAdapter for one that could be read in two ways, or holds a password."""
    shown = without_secrets(url)[:200]
    if len(url) > LONGEST_URL or _ODD.search(url):
        raise InvalidAdapter(
            f"{shown!r}: a URL has at most {LONGEST_URL} characters, no blanks, and what isn't ASCII is percent-encoded"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidAdapter(f"{shown.rpartition('@')[2]!r} is no URL: {error}") from None
    scheme = parts.scheme.lower()
    path = parts.path
    if scheme in WEB and "@" in parts.netloc:
        raise InvalidAdapter("the URL holds a name or a password; give a token in the field token instead")
    if parts.fragment:
        raise InvalidAdapter(f"{shown!r}: a source's URL has no fragment (#…)")
    segments = [unquote(part) for part in path.strip("/").split("/")]
    if "//" in path or any(part in (".", "..") or "/" in part or "\\" in part for part in segments):
        raise InvalidAdapter(f"{shown!r}: a source's path has no empty parts, no . and no .. in it")
    host = parts.netloc
    if scheme in WEB:
        host = (parts.hostname or "").rstrip(".")
        host = f"[{host}]" if ":" in host else host
        host += f":{port}" if port not in (None, _PORTS[scheme]) else ""
        if not host:
            raise InvalidAdapter(f"{shown!r} names no host")
    return Place(scheme, host, path.strip("/"), parts.query)


def without_secrets(url: str) -> str:
    """Return a URL as it may be told: without a query, where signatures are, and a name and password of a host."""
    scheme, separator, rest = url.partition("?")[0].partition("#")[0].partition("://")
    authority, slash, path = rest.partition("/")
    user, _, host = authority.rpartition("@")
    # An account's container and a revision stand there too.
    if scheme.lower() in WEB or ":" in user:
        authority = host
    return f"{scheme}{separator}{authority}{slash}{path}"


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the operator listed."""

    places: tuple[Place, ...] = ()

    @classmethod
    def of(cls, urls: Iterable[str]) -> "Allowed":
        """Take a list of URLs. Raises ValueError for one that lists nothing that could be read."""
        places = []
        for url in urls:
            try:
                place = parse_place(url) if not re.fullmatch(r"hf:/*", url) else Place(HUB, "", "")
            except InvalidAdapter as error:
                raise ValueError(str(error)) from None
            if place.scheme not in SCHEMES or place.query or not (place.host or place.scheme == HUB):
                shown = ", ".join(f"{scheme}://" for scheme in SCHEMES)
                raise ValueError(
                    f"{url!r} lists no place: expected one of {shown} with a host, as https://host/path/"
                )
            places.append(place)
        return cls(tuple(places))

    def admits(self, place: Place) -> bool:
        """Return whether a place is listed or lies below one that is."""
        return any(listed.contains(place) for listed in self.places)

    def check(self, place: Place) -> None:
        """Raise SourceForbidden for a place that isn't let through; which are isn't told."""
        if not self.admits(place):
            raise SourceForbidden(
                f"{str(place)!r} is no place that this server may read adapters from: whoever runs it lists those"
                " with --allow-source"
            )

    def lists(self, scheme: str) -> bool:
        """Return whether anything of a scheme is let through."""
        return any(place.scheme == scheme for place in self.places)

    def below(self, folder: str) -> "Allowed":
        """Return what a tenant may read: of object stores, read with the operator's rights, its own folder."""
        return Allowed(
            tuple(
                replace(place, path=f"{place.path}{'/' if place.path else ''}{folder}")
                if place.scheme in OBJECTS
                else place
                for place in self.places
            )
        )


NOWHERE = Allowed()
