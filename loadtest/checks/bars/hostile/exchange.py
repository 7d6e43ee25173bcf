"""One connection of a hostile client as data, and its performance: bytes as they are, no HTTP library's manners.

An Exchange says what is sent, in which pieces, and when the client leaves; `perform` does it and says what came back.
"""

import asyncio
import contextlib
import json
import time
from dataclasses import asdict, dataclass, field

HEAD_KEPT = 1 << 16
"""Bytes of an answer that are kept; the rest is counted."""
NO_ANSWER, HUNG, REFUSED = 0, -1, -2
"""In the place of a status: left or cut off without one; none within the limit; the connection wasn't taken."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one connection does."""

    pieces: tuple[bytes, ...]
    pause: float = 0.0
    """Seconds between the pieces."""
    leave_after: int | None = None
    """Leave after so many bytes of the answer; None: when it is complete."""
    linger: float = 0.0
    """With ``leave_after``, seconds to wait for those bytes at most."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an exchange ended."""

    status: int
    code: str = ""
    """The error's code or type from the envelope; empty for an error that has none."""
    message: str = ""
    size: int = 0
    began: float = 0.0
    ended: float = 0.0
    """By CLOCK_MONOTONIC, which all processes of a machine share."""


@dataclass(slots=True)
class _Answer:
    head: bytearray = field(default_factory=bytearray)
    size: int = 0

    def add(self, piece: bytes) -> None:
        self.head += piece[: HEAD_KEPT - len(self.head)]
        self.size += len(piece)


def request(method: str, path: str, body: bytes = b"", headers: tuple[str, ...] = ()) -> Exchange:
    """Return a whole request whose answer is awaited."""
    return Exchange(
        (head(method, path, len(body), headers), body) if body else (head(method, path, 0, headers),)
    )


def call(method: str, path: str, body: object) -> Exchange:
    """Return a request with a JSON body. What isn't JSON (NaN, halves of surrogate pairs) is written as Python does."""
    return request(method, path, json.dumps(body).encode("utf-8", "surrogatepass"))


def head(method: str, path: str, length: int, headers: tuple[str, ...] = ()) -> bytes:
    """Return a request's head; the connection is closed after the answer, so that its end is the answer's."""
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "connection: close"]
    if length or method not in ("GET", "HEAD", "DELETE"):
        lines += ["content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("utf-8", "surrogatepass")


async def perform(exchange: Exchange, host: str, port: int, limit: float) -> Outcome:
    """Do it, within ``limit`` seconds."""
    began = time.monotonic()
    answer = _Answer()
    try:
        async with asyncio.timeout(limit):
            status = await _converse(exchange, host, port, answer)
    except TimeoutError:
        status = HUNG
    code, message = _envelope(bytes(answer.head)) if status >= 400 else ("", "")
    return Outcome(status, code, message, answer.size, began, time.monotonic())


def to_json(outcome: Outcome) -> dict[str, object]:
    """Return an outcome's fields."""
    return asdict(outcome)


async def _converse(exchange: Exchange, host: str, port: int, answer: _Answer) -> int:
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return REFUSED
    sending = asyncio.create_task(_send(exchange, writer))
    try:
        if exchange.leave_after is None:
            await _read(reader, answer, None)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(exchange.linger):
                    await sending
                    await _read(reader, answer, exchange.leave_after)
    finally:
        sending.cancel()
        # A hang-up, not a farewell: what is still in the socket is dropped.
        writer.transport.abort()
    return _status(answer)


async def _send(exchange: Exchange, writer: asyncio.StreamWriter) -> None:
    # A server that has answered early may have closed: its answer is read all the same.
    with contextlib.suppress(OSError):
        for number, piece in enumerate(exchange.pieces):
            if number and exchange.pause:
                await asyncio.sleep(exchange.pause)
            writer.write(piece)
            await writer.drain()


async def _read(reader: asyncio.StreamReader, answer: _Answer, enough: int | None) -> None:
    with contextlib.suppress(OSError):
        while enough is None or answer.size < enough:
            piece = await reader.read(HEAD_KEPT if enough is None else min(HEAD_KEPT, enough - answer.size))
            if not piece:
                return
            answer.add(piece)


def _status(answer: _Answer) -> int:
    words = bytes(answer.head[:32]).split(b" ", 2)
    return (
        int(words[1])
        if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit()
        else NO_ANSWER
    )


def _envelope(answer: bytes) -> tuple[str, str]:
    """Return the code (or type) and the message of an error in OpenAI's envelope; empty if there is none."""
    _, _, body = answer.partition(b"\r\n\r\n")
    begin, end = body.find(b"{"), body.rfind(b"}")
    try:
        error = json.loads(body[begin : end + 1])["error"]
        return str(error["code"] or error["type"]), str(error["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return "", body[:200].decode(errors="replace")
