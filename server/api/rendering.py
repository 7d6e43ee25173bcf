"""Answers as JSON text. Large ones are written in a thread, in parts, so that the event loop gets its turns."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator

from fastapi.responses import Response

PARTS_AT_A_TIME = 64
"""Parts that are written before other threads get their turn: under 0.2 ms, of long lists some 1 ms."""
SCALARS_A_PART = 256
"""Numbers or texts of a list that are written as one part."""
LEVELS = 5
"""How deep an answer is taken apart: choices, choice, logprobs, content, token."""


def dumps(value: object) -> str:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps_in_parts(value: object) -> str:
    """Return what ``dumps`` does; iterators are lists whose items are made as they are written.

    The encoder, which holds the interpreter lock, sees small parts only.
    """
    return "".join(_giving_way(_parts(value, LEVELS)))


async def json_response(make: Callable[[], object], *, large: bool) -> Response:
    """Return what ``make`` returns as a response; if it may be ``large``, it is made and written in a thread."""
    content = await asyncio.to_thread(lambda: dumps_in_parts(make())) if large else dumps(make())
    return Response(content, media_type="application/json")


def _giving_way(parts: Iterator[str]) -> Iterator[str]:
    """Let other threads have the interpreter between parts, who would wait out a whole switch interval for it."""
    for number, part in enumerate(parts):
        if number % PARTS_AT_A_TIME == 0:
            time.sleep(0)
        yield part


def _parts(value: object, levels: int) -> Iterator[str]:
    if levels and isinstance(value, dict):
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield f"{',' if index else ''}{dumps(key)}:"
            yield from _parts(item, levels - 1)
        yield "}"
    elif isinstance(value, list) and value and not isinstance(value[0], list | dict):
        yield "["
        for start in range(0, len(value), SCALARS_A_PART):
            yield f"{',' if start else ''}{dumps(value[start : start + SCALARS_A_PART])[1:-1]}"
        yield "]"
    elif levels and isinstance(value, list | Iterator):
        yield "["
        for index, item in enumerate(value):
            if index:
                yield ","
            yield from _parts(item, levels - 1)
        yield "]"
    else:
        yield dumps(value)
