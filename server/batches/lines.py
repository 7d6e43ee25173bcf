"""A batch's lines: read one by one from its input, checked all together, and written as OpenAI writes their answers."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from manylora.server.batches.records import MOST_LINES, BatchError, Usage

MOST_ERRORS = 100
"""Errors of an input that are told."""
LONGEST_ID = 512
"""Characters of a custom_id."""
MOST_BYTES = 200 << 20
"""Of an input, as OpenAI has it."""
_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""What readers that split lines as Python does would take for an end of line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    number: int
    """From 0, empty lines not counted."""
    custom_id: str
    body: bytes
    """JSON."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a line got."""

    status: int
    request_id: str
    body: bytes
    """JSON in UTF-8."""
    retry_after: float | None = None
    """Seconds after which it may be tried again."""
    final: bool = True
    """Whether it would be the same if it were tried again."""


_FAULT = {"message": "the server failed on this line", "type": "server_error", "param": None}
FAILED = Answered(500, "", json.dumps({"error": {**_FAULT, "code": "internal_error"}}).encode())
"""What a line got on which the server failed without an answer."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in an input."""

    total: int
    errors: tuple[BatchError, ...]
    model: str | None
    """That all lines ask for, if it is one."""


def read_lines(path: Path, largest: int) -> Iterator[tuple[int, bytes]]:
    """Yield (place from 1, line) of a file, without lines that are blank; of one over ``largest`` bytes too many.

    Those after twice as many as a batch may have are not looked at, blank or not: whoever reads is to stop.
    """
    with path.open("rb") as file:
        place = 0
        while line := file.readline(largest + 2):
            place += 1
            if place > 2 * MOST_LINES or line.strip():
                yield place, line
            while not line.endswith(b"\n") and (line := file.readline(largest)):
                pass  # the rest of one that is too long


def check(path: Path, endpoint: str, largest: int) -> Checked:
    """Read an input whole and say what is wrong with it; a body's own fields its request will tell."""
    errors: list[BatchError] = []
    seen: set[str] = set()
    models: set[object] = set()
    total = 0
    if path.stat().st_size > MOST_BYTES:
        too_large = f"the input has over {MOST_BYTES >> 20} MiB: send several batches"
        return Checked(0, (BatchError("file_too_large", too_large),), None)
    for place, raw in read_lines(path, largest):
        total += 1
        if total > MOST_LINES or place > 2 * MOST_LINES:
            many = f"the input has over {MOST_LINES} lines, or too many blank ones: send several batches"
            return Checked(total, (BatchError("too_many_tasks", many, place),), None)
        found = _fault(raw, endpoint, largest, seen, models)
        if found is not None:
            code, param, message = found
            errors.append(BatchError(code, message, place, param))
            if len(errors) == MOST_ERRORS:
                break
    if not total:
        errors.append(BatchError("empty_file", "the input has no line: give one JSON object on each"))
    model = next(iter(models)) if len(models) == 1 else None
    return Checked(total, tuple(errors), model if isinstance(model, str) else None)


def lines_of(path: Path, largest: int, without: set[int]) -> Iterator[Line]:
    """Yield the lines of an input that was checked, but those of these numbers."""
    for number, (_, raw) in enumerate(read_lines(path, largest)):
        if number not in without:
            value = from_json(raw)
            yield Line(number, value["custom_id"], to_json(value["body"]))


def written(custom_id: str, answer: Answered) -> str:
    """Return the line of an output, with its end."""
    told = answer.body.decode(errors="replace").translate(_BREAKS).replace("\n", " ")
    head = json.dumps({"status_code": answer.status, "request_id": answer.request_id})
    return _line(custom_id, f'{head[:-1]}, "body": {told}}}', "null")


def unanswered(custom_id: str, code: str, message: str) -> str:
    """Return the line of a request that got no answer."""
    return _line(custom_id, "null", json.dumps({"code": code, "message": message}))


def usage_of(answer: Answered) -> Usage:
    """Return the tokens that an answer tells of. Raises ValueError for one that isn't whole."""
    body: Any = from_json(answer.body)
    if answer.status != 200:
        return Usage()
    told = body.get("usage") or {}
    details = told.get("prompt_tokens_details") or {}
    return Usage(
        told.get("prompt_tokens", 0), told.get("completion_tokens", 0), details.get("cached_tokens", 0)
    )


def _line(custom_id: str, response: str, error: str) -> str:
    identity = f"batch_req_{uuid.uuid4().hex}"
    return f'{{"id": "{identity}", "custom_id": {json.dumps(custom_id)}, "response": {response}, "error": {error}}}\n'


def _fault(
    raw: bytes, endpoint: str, largest: int, seen: set[str], models: set[object]
) -> tuple[str, str | None, str] | None:
    """Return (code, field, message) of the first fault of a line; note its custom_id and its model."""
    if len(raw.rstrip(b"\r\n")) > largest:
        return "line_too_long", None, f"this line is over {largest} bytes"
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        return "invalid_json_line", None, f"this line is not JSON in UTF-8: {error}"
    if not isinstance(value, dict):
        return "invalid_json_line", None, "this line is no JSON object"
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= LONGEST_ID:
        return "invalid_custom_id", "custom_id", f"custom_id must be a text of 1 to {LONGEST_ID} characters"
    if custom_id in seen:
        return "duplicate_custom_id", "custom_id", f"custom_id {custom_id[:100]!r} is on an earlier line too"
    seen.add(custom_id)
    if value.get("method") != "POST":
        return "invalid_method", "method", 'method must be "POST"'
    if value.get("url") != endpoint:
        return "mismatched_endpoint", "url", f"url must be the batch's endpoint, {endpoint}"
    if not isinstance(body, dict):
        return "invalid_body", "body", "body must be a JSON object"
    unknown = next((key for key in value if key not in ("custom_id", "method", "url", "body")), None)
    if unknown is not None:
        return "unknown_field", unknown[:100], "a line has custom_id, method, url and body"
    if body.get("stream"):
        return "invalid_body", "body.stream", "a batch's answers are not streamed"
    model = body.get("model")
    models.add(model if isinstance(model, str) else None)
    return None
