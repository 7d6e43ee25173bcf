"""Reading a request's body: bounded while it arrives, parsed and checked off the loop when large.

A thread alone does not keep the event loop and the engine free: a parser holds the interpreter lock from the first byte
to the last. So a body's size and its number of values are bounded, and the parser is a fast one (pydantic's).
"""

import asyncio
from typing import TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from manylora.server.api.dependencies import dependencies
from manylora.server.api.error_responses import invalid_field
from manylora.server.api.request_context import note
from manylora.server.errors import BodyTooLarge, InvalidRequest

Body = TypeVar("Body", bound=BaseModel)
ON_THE_LOOP = 64 << 10
"""Bytes that are parsed where they arrive: it takes about a millisecond."""
TOO_MANY_VALUES, TOO_MANY_PARTS = 500_000, 100_000
"""Values, and lists, objects or members of objects, over which a body is refused: so many take 10 to 40 ms."""
NOTED = ("model", "name", "lora_name")
"""Fields that a request's log line repeats, whether or not the rest of the body can be read."""
MAX_FIELDS = 100
"""Fields of a body, known or not: more than any route has."""


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return the body as ``model``. Raises BodyTooLarge or InvalidRequest naming the field."""
    return await _parsed(await _read(request, dependencies(request).settings.max_body_bytes), model)


async def read_body_if_any(request: Request, model: type[Body]) -> Body:
    """Return the body as ``model``; none is an object without members. Raises what ``read_body`` raises."""
    raw = await _read(request, dependencies(request).settings.max_body_bytes)
    return await _parsed(raw or b"{}", model)


async def _parsed(raw: bytes, model: type[Body]) -> Body:
    if len(raw) <= ON_THE_LOOP:
        return parse(raw, model)
    return await asyncio.to_thread(parse, raw, model)


def parse(raw: bytes, model: type[Body]) -> Body:
    """Parse and check a JSON object. Raises BodyTooLarge or InvalidRequest naming the field."""
    _check_counts(raw)
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        if raw.startswith(b"--"):
            raise InvalidRequest("the body is a form, and this route takes a JSON object") from None
        raise InvalidRequest(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    if len(value) > MAX_FIELDS:
        raise InvalidRequest(f"the body has {len(value)} fields, at most {MAX_FIELDS} are read")
    note(**{key: value[key] for key in NOTED if isinstance(value.get(key), str)})
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_field(error) from None


def _check_counts(raw: bytes) -> None:
    """Refuse a text of too many values. numpy counts without the interpreter lock, bytes.count with it."""
    characters = np.frombuffer(raw, dtype=np.uint8)

    def count(marks: bytes) -> int:
        return sum(int(np.count_nonzero(characters == mark)) for mark in marks)

    # Inside strings these are no values: the counts are upper bounds.
    containers, pairs = count(b"[{"), count(b":")
    if containers + count(b",") > TOO_MANY_VALUES or containers > TOO_MANY_PARTS or pairs > TOO_MANY_PARTS:
        raise BodyTooLarge(
            f"the body holds more than {TOO_MANY_VALUES} commas and brackets, {TOO_MANY_PARTS} brackets"
            f" or {TOO_MANY_PARTS} colons"
        )


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
