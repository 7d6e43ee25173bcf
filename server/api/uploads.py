"""multipart/form-data as it arrives: small fields are kept, files go where they are to lie, piece by piece."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manylora.server.errors import InvalidRequest

MOST_FIELDS, LONGEST_FIELD = 16, 4096
"""Fields beside the file, and bytes of one."""
PIECE = 1 << 20
"""Bytes that are written at once."""


class Receiver(Protocol):
    """Takes the form's files, one after the other. Called in a thread, in order."""

    def begin(self, filename: str) -> None:
        """Take what follows as this file's content."""
        ...

    def write(self, chunk: bytes) -> None:
        """Take the next piece."""
        ...


@dataclass(slots=True)
class Upload:
    """What came beside the files' content."""

    fields: dict[str, str] = field(default_factory=dict)
    filenames: list[str] = field(default_factory=list)


async def read_upload(
    request: Request,
    receiver: Receiver,
    *,
    most_files: int = 1,
    before_files: Callable[[Mapping[str, str]], None] = lambda fields: None,
) -> Upload:
    """Read a form; its parts "file" are given to ``receiver``.

    ``before_files`` is given the fields that came before the first file. Raises InvalidRequest for what is no form or
    has too much beside the files, what ``before_files`` and what the receiver raise.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("the content-type must be multipart/form-data with a boundary")
    reading = _Reading(most_files, before_files)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reading.part_begins,
                "on_header_field": reading.header_name,
                "on_header_value": reading.header_value,
                "on_header_end": reading.header_ends,
                "on_headers_finished": reading.headers_end,
                "on_part_data": reading.data,
                "on_part_end": reading.part_ends,
                "on_end": reading.form_ends,
            },
        )
        async for chunk in request.stream():
            parser.write(chunk)
            if reading.waiting >= PIECE:
                await asyncio.to_thread(_hand_over, reading.take(), receiver)
    except FormParserError as error:
        raise InvalidRequest(f"the body is no multipart/form-data: {error}") from None
    if not reading.ended:
        raise InvalidRequest("the body ends before its form does")
    await asyncio.to_thread(_hand_over, reading.take(), receiver)
    return reading.upload


def _hand_over(pieces: list[str | bytes], receiver: Receiver) -> None:
    for is_name, same in groupby(pieces, lambda piece: isinstance(piece, str)):
        if is_name:
            for name in same:
                receiver.begin(str(name))
        else:
            receiver.write(b"".join(piece for piece in same if isinstance(piece, bytes)))


class _Reading:
    """What the parser says, part by part."""

    def __init__(self, most_files: int, before_files: Callable[[Mapping[str, str]], None]) -> None:
        self.upload = Upload()
        self.waiting = 0
        self.ended = False
        self._most_files = most_files
        self._before_files = before_files
        self._pieces: list[str | bytes] = []
        """Names of files, each before its content."""
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = b"", b""
        self._field: str | None = None
        self._text = b""

    def take(self) -> list[str | bytes]:
        """Return what came of the files since the last call."""
        pieces, self._pieces, self.waiting = self._pieces, [], 0
        return pieces

    def part_begins(self) -> None:
        self._headers, self._field, self._text = {}, None, b""

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_ends(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file":
            names = self.upload.filenames
            if len(names) == self._most_files:
                told = "one file" if self._most_files == 1 else f"{self._most_files} files at most"
                raise InvalidRequest(f"give {told}", param="file")
            if not names:
                self._before_files(self.upload.fields)
            names.append(options.get(b"filename", b"").decode("utf-8", "replace") or "file")
            self._pieces.append(names[-1])
            return
        if len(self.upload.fields) == MOST_FIELDS or name in self.upload.fields:
            raise InvalidRequest(f"the form has too many fields, or {name[:100]!r} twice", param=name[:100])
        self._field = name
        self.upload.fields[name] = ""

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._pieces.append(data[start:end])
            self.waiting += end - start
            return
        self._text += data[start:end]
        if len(self._text) > LONGEST_FIELD:
            raise InvalidRequest(
                f"{self._field[:100]} is over {LONGEST_FIELD} bytes", param=self._field[:100]
            )

    def part_ends(self) -> None:
        if self._field is not None:
            self.upload.fields[self._field] = self._text.decode("utf-8", "replace")

    def form_ends(self) -> None:
        self.ended = True
