"""Reading a request's body: bounded while it arrives, parsed and checked off the loop when large."""

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.dependencies import dependencies
from server.api.error_responses import invalid_field
from server.errors import BodyTooLarge, InvalidRequest

Body = TypeVar("Body", bound=BaseModel)
# Parsing this much takes about a millisecond.
ON_THE_LOOP = 64 << 10


async def read_body(request: Request, model: type[Body]) -> Body:
    """Return the body as ``model``. Raises BodyTooLarge or InvalidRequest naming the field."""
    raw = await _read(request, dependencies(request).settings.max_body_bytes)
    if len(raw) <= ON_THE_LOOP:
        return parse(raw, model)
    return await asyncio.to_thread(parse, raw, model)


def parse(raw: bytes, model: type[Body]) -> Body:
    """Parse and check a JSON object."""
    try:
        value = json.loads(raw)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    _refuse_surrogates(raw, value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_field(error) from None


def _refuse_surrogates(raw: bytes, value: dict[str, Any]) -> None:
    """JSON can spell half a UTF-16 pair, which is no text in any encoding."""
    if b"\\ud" not in raw and b"\\uD" not in raw:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
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
