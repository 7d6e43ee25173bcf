"""What is to be registered, as a request says it: a JSON object that names it, or a form that brings it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request

from manylora.adapters.files import KNOWN_FILES
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.upload import SHOWN, Upload
from manylora.adapters.store import as_store_full
from manylora.server.api.adapter_schemas import AdapterUpdate
from manylora.server.api.body import read_body
from manylora.server.api.inert import LONGEST_NAME
from manylora.server.api.openapi import body_of
from manylora.server.api.request_context import note
from manylora.server.api.uploads import read_upload
from manylora.server.catalog import AdapterCatalog
from manylora.server.errors import BodyTooLarge, InvalidRequest

Body = TypeVar("Body", bound=AdapterUpdate)
FORM = "multipart/form-data"
_WISHES = ("preload", "pin")
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Asked(Generic[Body]):
    """What a request asks for."""

    body: Body
    offer: Offer | None
    """The source, uploaded or named; None: a mixture is asked for."""
    held: AsyncExitStack
    """What must stay as long as the offer is used."""


def adapter_body(model: type[AdapterUpdate], *, has_name: bool) -> dict[str, Any]:
    """Return the OpenAPI fragment of a body that is a JSON object of ``model``, or a form with files."""
    found = body_of(model)
    word = {"enum": sorted(_WORDS)}
    properties: dict[str, Any] = {
        **({"name": {"type": "string", "minLength": 1}} if has_name else {}),
        **dict.fromkeys(_WISHES, word),
        "file": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "maxItems": len(KNOWN_FILES),
            "description": "The adapter's files, each with its name as filename; or one archive of them.",
        },
    }
    required = ["name", "file"] if has_name else ["file"]
    schema = {"type": "object", "required": required, "additionalProperties": False, "properties": properties}
    found["requestBody"]["content"][FORM] = {"schema": schema}
    return found


@asynccontextmanager
async def asked_of(
    request: Request, catalog: AdapterCatalog, model: type[Body], check: Callable[[Body], None]
) -> AsyncIterator[Asked[Body]]:
    """Read a request's body; ``check`` is asked before files are taken, and of all that a form says in the end.

    What is uploaded is deleted when the block ends, unless ``held`` was taken over. Raises InvalidRequest,
    BodyTooLarge, QueueFull, and what Upload raises.
    """
    async with AsyncExitStack() as held:
        if not request.headers.get("content-type", "").lower().startswith(FORM):
            body = await read_body(request, model)
            check(body)
            offer = None if body.src is None else Offer(body.src, body.token)
            yield Asked(body, offer, held)
            return
        upload = await held.enter_async_context(catalog.receiving())
        body = await _read_form(request, upload, model, check)
        with as_store_full():
            source = await asyncio.to_thread(upload.end)
        yield Asked(body, Offer(SHOWN, source=source), held)


async def _read_form(
    request: Request, upload: Upload, model: type[Body], check: Callable[[Body], None]
) -> Body:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > upload.max_bytes + (1 << 20):
        raise BodyTooLarge(f"the form is over the {upload.max_bytes} bytes that an adapter may have here")

    def check_fields(fields: Mapping[str, str]) -> None:
        check(_body_of(fields, model))

    with as_store_full():
        form = await read_upload(request, upload, most_files=len(KNOWN_FILES), before_files=check_fields)
    body = _body_of(form.fields, model)
    check(body)  # fields may come behind the files
    return body


def _body_of(fields: Mapping[str, str], model: type[Body]) -> Body:
    """Return what the form's fields say. Raises InvalidRequest for one that isn't known or makes no sense."""
    known = {*_WISHES, *(("name",) if "name" in model.model_fields else ())}
    unknown = next((field for field in fields if field not in known), None)
    if unknown is not None:
        shown = unknown[:LONGEST_NAME]
        raise InvalidRequest(f"{shown}: not a field of this form", param=shown)
    if "name" in known and not fields.get("name"):
        raise InvalidRequest("name: give it before the files", param="name")
    values: dict[str, Any] = {"src": SHOWN, **fields}
    for wish in _WISHES:
        if wish in fields:
            if fields[wish] not in _WORDS:
                raise InvalidRequest(f"{wish}: give true or false", param=wish)
            values[wish] = _WORDS[fields[wish]]
    if "name" in fields:
        note(name=fields["name"])
    return model.model_validate(values)
