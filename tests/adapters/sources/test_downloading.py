"""One file after the other, no further than it may go: whatever a host claims, sends, or leaves out."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from manylora.adapters.errors import InvalidAdapter, SourceUnreachable
from manylora.adapters.files import KNOWN_FILES, MAX_TEXT_BYTES
from manylora.adapters.sources.allowed import Place
from manylora.adapters.sources.downloading import Seen, download
from manylora.adapters.sources.remote import RemoteSource
from manylora.adapters.sources.source import Heard, unheard
from manylora.adapters.sources.web import Answer, Web, WebLimits

PLACE = Place("https", "host", "a/adapter_model.safetensors")
NAME = "adapter_model.safetensors"
MOST = 1000


@dataclass
class Told:
    """A web that answers as a test says, and what it was asked for."""

    answers: list[tuple[int, dict[str, str], Iterator[bytes]]]
    ranges: list[str | None] = field(default_factory=list)
    limits: WebLimits = field(default_factory=lambda: WebLimits(pauses=(0.0,)))

    @contextmanager
    def ask(self, method: str, place: Place, headers: Mapping[str, str]) -> Iterator[Answer]:
        self.ranges.append(headers.get("range"))
        status, more, body = self.answers.pop(0)
        yield Answer(status, {"etag": '"1"', **more}, place, body)

    def pause(self, seconds: float) -> None:
        """No time passes."""


def fetched(told: Told, size: int | None = None) -> bytes:
    """Return what was written when it ended, and hold it to that however it ended."""
    file = io.BytesIO()
    try:
        download(cast(Web, told), PLACE, NAME, Seen(size, '"1"'), MOST, file, unheard)
    finally:
        assert len(file.getvalue()) <= MOST
    return file.getvalue()


def unread() -> Iterator[bytes]:
    yield from map(_refuse, (b"",))


def _refuse(piece: bytes) -> bytes:
    raise AssertionError("it was refused, and read all the same")


def test_a_body_without_end_is_left_where_it_is_too_long() -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(100)
        raise AssertionError("it is read on and on")

    with pytest.raises(InvalidAdapter, match=f"{NAME}: 1100 bytes or more; at most 1000"):
        fetched(Told([(200, {}, endless())]))


def test_what_fills_all_that_it_may_have_comes_over() -> None:
    assert fetched(Told([(200, {}, iter([bytes(MOST)]))])) == bytes(MOST)


def test_a_length_that_is_too_much_is_refused_unread() -> None:
    with pytest.raises(InvalidAdapter, match="1001 bytes or more"):
        fetched(Told([(200, {"content-length": "1001"}, unread())]))


def test_a_body_that_ends_before_its_length_is_gone_on_with() -> None:
    rest = {"content-range": "bytes 600-999/1000", "content-length": "400"}
    told = Told([(200, {"content-length": "1000"}, iter([b"a" * 600])), (206, rest, iter([b"b" * 400]))])
    assert fetched(told, MOST) == b"a" * 600 + b"b" * 400
    assert told.ranges == [None, "bytes=600-"]


def test_another_part_than_was_asked_for_is_not_put_behind_what_is_there() -> None:
    other = {"content-range": "bytes 500-999/1000", "content-length": "400"}
    with pytest.raises(SourceUnreachable, match="another part"):
        fetched(Told([(200, {"content-length": "1000"}, iter([b"a" * 600])), (206, other, unread())]), MOST)


class Shelf:
    """A place with the two files that an adapter must have; says how many bytes each was allowed."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.allowed: dict[str, int] = {}

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *ignored: object) -> None:
        pass

    def look(self, name: str) -> Seen | None:
        return Seen(self.sizes[name], '"1"') if name in self.sizes else None

    def read(self, name: str, seen: Seen, most: int, file: BinaryIO, heard: Heard) -> None:
        self.allowed[name] = most
        file.write(bytes(self.sizes[name]))
        heard(self.sizes[name], seen.size)


def test_each_file_may_have_what_is_its_own_and_left_of_all(tmp_path: Path) -> None:
    config, weights, tokenizer = KNOWN_FILES[0], KNOWN_FILES[1], "special_tokens_map.json"
    shelf = Shelf({config: 100, weights: 3000, tokenizer: 50})
    source = RemoteSource("x", None, lambda: shelf, "x")
    told: list[tuple[int, int | None]] = []
    most = MAX_TEXT_BYTES
    copied = source.fetch(tmp_path / "whole", most, lambda done, total: told.append((done, total)))
    assert copied.nbytes == 3150
    assert shelf.allowed == {config: 1 << 20, weights: most - 100, tokenizer: 1 << 20}
    assert told == [(0, 3150), (100, 3150), (3100, 3150), (3150, 3150)]
    source.fetch(tmp_path / "tight", 3150)
    assert shelf.allowed == {config: 3150, weights: 3050, tokenizer: 50}
