"""Answers as JSON text. Large ones are written in a thread, in parts, so that the event loop gets its turns."""

import asyncio
import json
from collections.abc import Callable, Iterator

from fastapi.responses import Response

from manylora.server.api.pacing import Rests

SCALARS_A_PART = 256
"""Numbers or texts of a list that are written as one part."""
LEVELS = 6
"""How deep an answer is taken apart: that of /v1/responses has its tokens in response, output, item, content, part,
logprobs."""


class Written(str):
    """JSON text inside a value: it goes into the value's text as it is, by ``pieces_of`` and ``dumps_in_parts``."""

    __slots__ = ()


_WITH_MORE_INSIDE = (dict, list, Iterator, Written)

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: object) -> str:
    """Return compact JSON."""
    return _ENCODER.encode(value)


def pieces_of(value: object) -> Iterator[str]:
    """Yield compact JSON of a value, Written inside it as it is: to be joined with what goes around it."""
    return _parts(value, LEVELS)


def dumps_in_parts(value: object, rests: Rests) -> str:
    """Return what ``dumps`` does, with rests in between; iterators are lists whose items are made as they are written.

    The encoder, which holds the interpreter lock, sees small parts only.
    """
    return "".join(rests.between(_parts(value, LEVELS)))


async def json_response(make: Callable[[], object], rests: Rests | None) -> Response:
    """Return what ``make`` returns as a response; one that may be large is given ``rests``, and made in a thread."""
    if rests is None:
        content = dumps(make())
    else:
        content = await asyncio.to_thread(lambda: dumps_in_parts(make(), rests))
    return Response(content, media_type="application/json")


def _parts(value: object, levels: int) -> Iterator[str]:
    if isinstance(value, Written):
        yield value
    elif levels and isinstance(value, dict) and _has_more_inside(value):
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


def _has_more_inside(value: dict[str, object]) -> bool:
    """Say whether a dict is worth being taken apart: one of texts and numbers alone is short."""
    return any(isinstance(item, _WITH_MORE_INSIDE) for item in value.values())
