"""What is to be registered, as a request says it: a JSON object that names it, or a form that brings it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json

from manylora.adapters.files import KNOWN_FILES
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.upload import SHOWN, Upload
from manylora.adapters.store import as_store_full
from manylora.server.api.adapter_schemas import FormField, Offered
from manylora.server.api.body import read_body
from manylora.server.api.documented import JSON
from manylora.server.api.error_responses import invalid_field
from manylora.server.api.inert import LONGEST_NAME
from manylora.server.api.openapi import body_of
from manylora.server.api.request_context import note
from manylora.server.api.uploads import read_upload
from manylora.server.catalog import AdapterCatalog
from manylora.server.errors import BodyTooLarge, InvalidRequest

Body = TypeVar("Body", bound=Offered)
FORM = "multipart/form-data"
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Asked(Generic[Body]):
    """What a request asks for."""

    body: Body
    offer: Offer | None
    """The source, uploaded or named; None: what is asked for is made of what is here."""
    held: AsyncExitStack
    """What must stay as long as the offer is used."""


def adapter_body(model: type[Offered]) -> dict[str, Any]:
    """Return the OpenAPI fragment of a body that is a JSON object of ``model``, or a form with files."""
    found = body_of(model)
    fields = found["requestBody"]["content"][JSON]["schema"]["properties"]
    properties: dict[str, Any] = {
        **{
            name: {"enum": sorted(_WORDS)} if kind == "flag" else fields[name]
            for name, kind in model.form.items()
        },
        "file": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "maxItems": len(KNOWN_FILES),
            "description": "The adapter's files, each with its name as filename; or one archive of them.",
        },
    }
    required = [*_required(model), "file"]
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
    unknown = next((field for field in fields if field not in model.form), None)
    if unknown is not None:
        shown = unknown[:LONGEST_NAME]
        raise InvalidRequest(f"{shown}: not a field of this form", param=shown)
    missing = next((field for field in _required(model) if not fields.get(field)), None)
    if missing is not None:
        raise InvalidRequest(f"{missing}: give it before the files", param=missing)
    said = {field: _value_of(field, model.form[field], text) for field, text in fields.items()}
    if "name" in fields:
        note(name=fields["name"])
    try:
        return model.model_validate({"src": SHOWN, **said})
    except ValidationError as error:
        raise invalid_field(error) from None


def _required(model: type[Offered]) -> list[str]:
    return [field for field, kind in model.form.items() if kind != "flag"]


def _value_of(field: str, kind: FormField, text: str) -> object:
    """Return a field as a JSON body would have it. Raises InvalidRequest for what is none of its kind."""
    if kind == "text":
        return text
    if kind == "flag":
        if text not in _WORDS:
            raise InvalidRequest(f"{field}: give true or false", param=field)
        return _WORDS[text]
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        raise InvalidRequest(f"{field}: give a number, as 0.1", param=field) from None
