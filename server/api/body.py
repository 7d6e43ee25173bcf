"""Reading a request's body: bounded while it arrives, parsed and checked off the loop when large.

A thread alone does not keep the event loop free: the C parser holds the interpreter lock from the first byte to
the last. So a body's size and its number of values are bounded, and between the two bounds for values it is
parsed in Python, which lets the loop in between.
"""

import asyncio
import json
import json.decoder
import json.scanner
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from manylora.server.api.dependencies import dependencies
from manylora.server.api.error_responses import invalid_field
from manylora.server.api.request_context import note
from manylora.server.errors import BodyTooLarge, InvalidRequest

Body = TypeVar("Body", bound=BaseModel)
ON_THE_LOOP = 64 << 10
"""Bytes that are parsed where they arrive: it takes about a millisecond."""
MANY_VALUES, TOO_MANY_VALUES, TOO_MANY_PAIRS = 60_000, 500_000, 150_000
"""Values from which on a body is parsed in Python (the C parser makes them in about ten milliseconds), and values
and members of objects over which it is refused: even making room for so many and dropping them takes that long."""
NOTED = ("model", "name", "lora_name")
"""Fields that a request's log line repeats, whether or not the rest of the body can be read."""
MAX_FIELDS = 100
"""Fields of a body, known or not: more than any route has."""


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return the body as ``model``. Raises BodyTooLarge or InvalidRequest naming the field."""
    raw = await _read(request, dependencies(request).settings.max_body_bytes)
    if len(raw) <= ON_THE_LOOP:
        return parse(raw, model)
    return await asyncio.to_thread(parse, raw, model)


def parse(raw: bytes, model: type[Body]) -> Body:
    """Parse and check a JSON object. Raises BodyTooLarge or InvalidRequest naming the field."""
    # Inside strings these bytes are no values: the counts are upper bounds.
    values, pairs = sum(raw.count(mark) for mark in (b",", b"[", b"{")), raw.count(b":")
    if values > TOO_MANY_VALUES or pairs > TOO_MANY_PAIRS:
        raise BodyTooLarge(
            f"the body holds more than {TOO_MANY_VALUES} commas and brackets or {TOO_MANY_PAIRS} colons"
        )
    try:
        text = raw.decode()
        value = (_FAIR if values > MANY_VALUES else _FAST).decode(text)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    if len(value) > MAX_FIELDS:
        raise InvalidRequest(f"the body has {len(value)} fields, at most {MAX_FIELDS} are read")
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(value)
    note(**{key: value[key] for key in NOTED if isinstance(value.get(key), str)})
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_field(error) from None


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


class _FairDecoder(json.JSONDecoder):
    """The standard decoder in Python: slower, and other threads get their turns."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_not_a_number)
        # The standard library's own, which its type stubs leave out.
        self.parse_object = json.decoder.JSONObject  # type: ignore[attr-defined]
        self.parse_array = json.decoder.JSONArray  # type: ignore[attr-defined]
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


_FAST, _FAIR = json.JSONDecoder(parse_constant=_not_a_number), _FairDecoder()


def _refuse_surrogates(value: object) -> None:
    """JSON can spell half a UTF-16 pair, which is no text in any encoding."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise InvalidRequest(
                    "the body holds half of a surrogate pair (\\ud800 to \\udfff), which is not text"
                ) from None


async def _read(request: Request, limit: int) -> bytes:
    message = f"the body is over the limit of {limit} bytes"
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(message)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(message)
        parts.append(part)
    return b"".join(parts)
