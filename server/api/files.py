"""/v1/files: what clients leave here for batches, and what batches made. To anybody else a file is not there."""

import asyncio
import time
from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse

from manylora.server.api.auth import require_api_key
from manylora.server.api.calling import current_caller
from manylora.server.api.dependencies import dependencies
from manylora.server.api.inert import LONGEST_NAME
from manylora.server.api.uploads import Upload, read_upload
from manylora.server.batches.files import FileStore, Incoming
from manylora.server.batches.records import StoredFile
from manylora.server.errors import InvalidRequest

SHORTEST, LONGEST = 3600, 30 * 24 * 3600
"""Seconds that a file may be kept for."""
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"const": "batch"},
                        "expires_after[anchor]": {"const": "created_at"},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": SHORTEST,
                            "maximum": LONGEST,
                        },
                    },
                }
            }
        },
    }
}
router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


def store_of(request: Request) -> FileStore:
    """Return where files are kept."""
    return dependencies(request).batches.files


@router.post("/v1/files", openapi_extra=FORM)
async def upload(request: Request) -> dict[str, object]:
    """Keep a file."""
    store, owner = store_of(request), current_caller().tenant
    incoming = await asyncio.to_thread(store.new, owner)
    try:
        form = await read_upload(request, _Content(incoming))
        expires_at = _checked(form)
        kept = await asyncio.to_thread(
            store.add, incoming, owner, "".join(form.filenames), form.fields["purpose"], expires_at
        )
    except BaseException:
        await asyncio.shield(asyncio.to_thread(incoming.discard))
        raise
    return kept.to_json()


@router.get("/v1/files")
async def list_files(
    request: Request,
    after: str | None = None,
    limit: int = Query(10_000, ge=1, le=10_000),
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, object]:
    """List one's own files, the newest first unless asked otherwise."""
    store, owner = store_of(request), current_caller().tenant
    found = await asyncio.to_thread(store.list, owner, purpose, after, limit + 1, ascending=order == "asc")
    return page([file.to_json() for file in found], limit)


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, file_id: str) -> dict[str, object]:
    """Describe a file."""
    return (await _own(request, file_id)).to_json()


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def content(request: Request, file_id: str) -> FileResponse:
    """Return what is in a file."""
    file = await _own(request, file_id)
    return FileResponse(
        store_of(request).path_of(file), media_type="application/octet-stream", filename=file.filename
    )


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> dict[str, object]:
    """Delete a file; a batch that reads it has it all the same."""
    await asyncio.to_thread(store_of(request).delete, file_id, current_caller().tenant)
    return {"id": file_id, "object": "file", "deleted": True}


class _Content:
    """Takes the one file of the form."""

    def __init__(self, incoming: Incoming) -> None:
        self.write = incoming.write

    def begin(self, filename: str) -> None:
        """Take its content: what it is called is kept when it is whole."""


def page(items: list[dict[str, object]], limit: int) -> dict[str, object]:
    """Return a part of a list; ``items`` has one more than ``limit`` if there are more."""
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
    none = {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **(ends or none), "has_more": len(items) > limit}


async def _own(request: Request, file_id: str) -> StoredFile:
    return await asyncio.to_thread(store_of(request).get, file_id, current_caller().tenant)


def _checked(form: Upload) -> int | None:
    """Return until when a file is kept. Raises InvalidRequest for a form that makes no sense."""
    fields: Mapping[str, str] = form.fields
    unknown = next((name for name in fields if name not in FIELDS), None)
    if unknown is not None:
        shown = unknown[:LONGEST_NAME]
        raise InvalidRequest(f"{shown}: not a field that this server knows", param=shown)
    if not form.filenames:
        raise InvalidRequest("file: the form has none", param="file")
    if fields.get("purpose") != "batch":
        raise InvalidRequest("purpose: give batch, files are kept for nothing else", param="purpose")
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at" or not (seconds or "").isdecimal():
        raise InvalidRequest(
            "expires_after: give anchor created_at and seconds, a whole number", param="expires_after"
        )
    count = int((seconds or "")[:12])
    if not SHORTEST <= count <= LONGEST:
        raise InvalidRequest(f"expires_after.seconds: give {SHORTEST} to {LONGEST}", param="expires_after")
    return int(time.time()) + count
