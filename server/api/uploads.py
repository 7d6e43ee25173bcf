"""multipart/form-data as it arrives: small fields are kept, the one file goes where it is to lie, piece by piece."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from manylora.server.errors import InvalidRequest

MOST_FIELDS, LONGEST_FIELD = 16, 4096
"""Fields beside the file, and bytes of one."""
PIECE = 1 << 20
"""Bytes that are written at once."""


@dataclass(slots=True)
class Upload:
    """What came beside the file's content."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """None: there was no file."""


async def read_upload(request: Request, write: Callable[[bytes], None]) -> Upload:
    """Read a form; the part "file" is given to ``write``, in a thread.

    Raises InvalidRequest for what is no form or has too much beside the file, and what ``write`` raises.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("the body must be multipart/form-data with a file and a purpose")
    reading = _Reading()
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
                await asyncio.to_thread(write, reading.take())
    except FormParserError as error:
        raise InvalidRequest(f"the body is no multipart/form-data: {error}") from None
    if not reading.ended:
        raise InvalidRequest("the body ends before its form does")
    await asyncio.to_thread(write, reading.take())
    return reading.upload


class _Reading:
    """What the parser says, part by part."""

    def __init__(self) -> None:
        self.upload = Upload()
        self.waiting = 0
        self.ended = False
        self._pieces: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = b"", b""
        self._field: str | None = None
        self._text = b""

    def take(self) -> bytes:
        """Return what came of the file since the last call."""
        pieces, self._pieces, self.waiting = self._pieces, [], 0
        return b"".join(pieces)

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
            if self.upload.filename is not None:
                raise InvalidRequest("give one file", param="file")
            self.upload.filename = options.get(b"filename", b"").decode("utf-8", "replace") or "file"
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
