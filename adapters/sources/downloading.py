"""One file over HTTP into a file of ours: in pieces where the connection breaks, but never pieces of two versions."""

from collections.abc import Set
from dataclasses import dataclass
from typing import BinaryIO

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, SourceUnreachable
from manylora.adapters.sources.allowed import Place
from manylora.adapters.sources.source import Heard
from manylora.adapters.sources.web import Answer, Interrupted, Web, check_status

NO_HEAD = frozenset({400, 403, 405, 501})
"""Statuses of hosts that answer GET alone, as for URLs that are signed for it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A file as its place tells of it before it is read."""

    size: int | None
    """None: it doesn't say."""
    tag: str | None
    """What changes with its contents; None: nothing tells."""
    sha256: str | None = None
    """Of its contents, where the place says it."""


def look(web: Web, place: Place, *, is_optional: bool = False) -> Seen | None:
    """Ask for a file's head; None: it isn't there. Raises as Web.ask, Web.patiently and check_status.

    Of what ``is_optional`` a 403 says so too: that is all that a bucket tells who may read it and not list it.
    """
    absent = frozenset({403} if is_optional else ())
    try:
        return web.patiently(lambda: _look(web, place, "HEAD") or _look(web, place, "GET", absent))
    except AdapterNotFound:
        return None


def _look(web: Web, place: Place, method: str, absent: Set[int] = frozenset()) -> Seen | None:
    """Return None where that method isn't answered, or with one of ``absent``. A body is left unread."""
    with web.ask(method, place) as answer:
        if answer.status in (NO_HEAD if method == "HEAD" else absent):
            return None
        check_status(answer, place)
        return Seen(answer.length, _tag(answer))


def download(web: Web, place: Place, name: str, seen: Seen, most: int, file: BinaryIO, heard: Heard) -> None:
    """Write what is at ``place`` to ``file``, which is empty; ``name`` is what errors call it.

    A connection that breaks is made anew from where it broke, as long as each brings something. Raises
    InvalidAdapter for more than ``most`` bytes, said or sent, or for another version than ``seen`` in between;
    SourceUnreachable, and as Web.ask.
    """
    transfer = _Transfer(web, place, name, seen, most, file, heard, seen.tag)
    pauses = iter(web.limits.pauses)
    while True:
        before = file.tell()
        try:
            transfer.go_on()
            return
        except Interrupted as error:
            if file.tell() > before:
                pauses = iter(web.limits.pauses)
            pause = next(pauses, None)
            if pause is None:
                raise SourceUnreachable(f"{error}, {file.tell()} bytes into {name}; try again") from None
            web.pause(pause)


@dataclass(slots=True)
class _Transfer:
    web: Web
    place: Place
    name: str
    seen: Seen
    most: int
    file: BinaryIO
    heard: Heard
    tag: str | None
    """Of what is in the file, or is to be: a place that names no version before is held to that of its first answer."""

    def go_on(self) -> None:
        """Read on from where the file ends to the end. Raises Interrupted."""
        start = self.file.tell()
        if start and not _is_strong(self.tag):
            start = self._begin_anew()  # nothing would tell that the rest belongs to what is here
        if start and start == self.seen.size:
            return
        # With If-Range a host that has something else by now sends all of it, and not a piece.
        headers = {"range": f"bytes={start}-", "if-range": self.tag or ""} if start else {}
        with self.web.ask("GET", self.place, headers) as answer:
            if answer.status == 416:
                raise changed(self.name)
            check_status(answer, self.place)
            tag = _tag(answer)
            if self.tag is not None and tag != self.tag:
                raise changed(self.name)
            self.tag = tag
            if answer.status == 206 and not _begins_at(answer, start):
                raise SourceUnreachable(
                    f"{self.place.host!r} sends another part of {self.name} than was asked for"
                )
            if start and answer.status == 200:
                start = self._begin_anew()
            self._take(answer, start)

    def _begin_anew(self) -> int:
        self.file.seek(0)
        self.file.truncate()
        return 0

    def _take(self, answer: Answer, start: int) -> None:
        size = self.seen.size
        if answer.length is not None:
            claimed = start + answer.length
            if size is not None and claimed != size:
                raise changed(self.name)
            size = claimed
        self._check(size or 0)
        done = start
        for chunk in answer.body:
            done += len(chunk)
            self._check(done)
            self.file.write(chunk)
            self.heard(done, size)
        if size is not None and done != size:
            raise Interrupted(f"{self.place.host!r} sent {done} of {size} bytes")

    def _check(self, size: int) -> None:
        if size > self.most:
            raise InvalidAdapter(f"{size} bytes or more; at most {self.most}", file=self.name)


def changed(name: str) -> InvalidAdapter:
    """Return the error for a file that became another while it was read."""
    return InvalidAdapter("changed at its source while it was read; try again when it is complete", file=name)


def _tag(answer: Answer) -> str | None:
    """Return what an answer says of its version: its ETag, else when it was last changed."""
    found = answer.headers.get("etag") or answer.headers.get("last-modified")
    return found[:512] if found else None


def _is_strong(tag: str | None) -> bool:
    """Return whether two answers with that tag are the same to the byte: a weak one, or a date, doesn't say so."""
    return tag is not None and tag.startswith('"')


def _begins_at(answer: Answer, start: int) -> bool:
    unit, _, rest = answer.headers.get("content-range", "").partition(" ")
    return unit.lower() == "bytes" and rest.partition("-")[0].strip() == str(start)
