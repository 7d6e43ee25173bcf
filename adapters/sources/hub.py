"""The hub as a place: which files a repository has in a revision, and where they are.

What it lists is asked of its API, and files are read by our own downloader, so that addresses, redirects, sizes and
times are checked as everywhere. Names, URLs and tokens are huggingface_hub's.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO
from urllib.parse import quote

from huggingface_hub import get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is, but not said to be

from manylora.adapters.errors import InvalidAdapter, SourceUnreachable
from manylora.adapters.sources.allowed import HUB, Place, parse_place
from manylora.adapters.sources.downloading import Seen, download
from manylora.adapters.sources.source import Heard
from manylora.adapters.sources.web import Passes, Web, WebLimits, check_status

HUB_ENDPOINT = "https://huggingface.co"
DEFAULT_REVISION = "main"
_HUBS_OWN = (".huggingface.co", ".hf.co")
"""Where the hub keeps large files, and redirects to."""
_MOST_LISTED = 16 << 20
"""Bytes of what the hub says of a repository."""
_REVISION = re.compile(r"[A-Za-z0-9._/-]{1,200}")


@dataclass(frozen=True, slots=True)
class HubName:
    """A folder of a model repository, in one revision."""

    repo: str
    revision: str = DEFAULT_REVISION
    folder: str = ""
    """Empty, or ending in a slash."""


def parse_hub(name: str) -> HubName:
    """Take ``org/name[/folder][@revision]`` apart. Raises InvalidAdapter."""
    path, at, revision = name.partition("@")
    parts = path.strip("/").split("/")
    try:
        if len(parts) < 2:
            raise HFValidationError("expected an account and a name, as org/name")
        validate_repo_id("/".join(parts[:2]))
        if (at and not _REVISION.fullmatch(revision)) or ".." in revision:
            raise HFValidationError("a revision is a branch, a tag or a commit")
    except HFValidationError as error:
        raise InvalidAdapter(f"{name[:200]!r} names no repository of the hub: {error}") from None
    folder = "".join(f"{part}/" for part in parts[2:])
    return HubName("/".join(parts[:2]), revision or DEFAULT_REVISION, folder)


@dataclass(frozen=True, slots=True)
class HubReading:
    """A repository in one commit."""

    web: Web
    endpoint: str
    name: HubName
    commit: str
    files: Mapping[str, Seen]

    def look(self, name: str) -> Seen | None:
        """Return what the hub said of a file when it was asked about the repository."""
        return self.files.get(f"{self.name.folder}{name}")

    def read(self, name: str, seen: Seen, most: int, file: BinaryIO, heard: Heard) -> None:
        """Download a file of the commit."""
        path = f"{self.name.folder}{name}"
        url = hf_hub_url(self.name.repo, path, revision=self.commit, endpoint=self.endpoint)
        # Its hash or its commit tells a version there; the ETag is the storage's behind it.
        download(self.web, parse_place(url), name, replace(seen, tag=None), most, file, heard)


def hub_endpoint() -> str:
    """Return the hub's address: HF_ENDPOINT's, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or HUB_ENDPOINT).rstrip("/")


def hub_token() -> str | None:
    """Return the operator's own token for the hub: HF_TOKEN's, or the one that `hf auth login` left."""
    return get_token()


def passes_hub(endpoint: str, passes: Passes) -> Passes:
    """Return where the hub may redirect to: itself, its own stores, and what is allowed anyway."""
    own = parse_place(endpoint)

    def check(place: Place) -> bool:
        is_own = (place.scheme, place.host) == (own.scheme, own.host)
        return is_own or (place.scheme == "https" and place.host.endswith(_HUBS_OWN)) or passes(place)

    return check


@contextlib.contextmanager
def reading_hub(name: HubName, token: str | None, limits: WebLimits, passes: Passes) -> Iterator[HubReading]:
    """Ask the hub about a repository and read from the commit that the revision is now, within the ``with``."""
    endpoint = hub_endpoint()
    with Web(limits, passes_hub(endpoint, passes), token) as web:
        commit, files = _listed(web, endpoint, name)
        yield HubReading(web, endpoint, name, commit, files)


def _listed(web: Web, endpoint: str, name: HubName) -> tuple[str, Mapping[str, Seen]]:
    url = f"{endpoint}/api/models/{name.repo}/revision/{quote(name.revision, safe='')}?blobs=true"
    # Not parse_place: a revision's slash is encoded.
    own = parse_place(endpoint)
    place = Place(own.scheme, own.host, url.partition("?")[0].split("/", 3)[3], "blobs=true")
    raw = web.patiently(lambda: _read_list(web, place, name))
    try:
        found = json.loads(raw)
        commit = str(found["sha"])
        return commit, {each["rfilename"]: _seen(each, commit) for each in found["siblings"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceUnreachable(f"{endpoint!r} answers as no hub does: {type(error).__name__}") from None


def _read_list(web: Web, place: Place, name: HubName) -> bytes:
    with web.ask("GET", place) as answer:
        check_status(answer, Place(HUB, "", f"{name.repo}@{name.revision}"))
        raw = b""
        for chunk in answer.body:
            raw += chunk
            if len(raw) > _MOST_LISTED:
                raise InvalidAdapter(f"what the hub lists of {name.repo!r} has over {_MOST_LISTED} bytes")
        return raw


def _seen(each: Mapping[str, object], commit: str) -> Seen:
    lfs = each.get("lfs")
    sha256 = str(lfs["sha256"]) if isinstance(lfs, dict) and lfs.get("sha256") else None
    size = each.get("size")
    return Seen(size if isinstance(size, int) else None, str(each.get("blobId") or commit), sha256)
