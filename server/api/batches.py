"""/v1/batches: the lines of a file, answered one by one behind everybody else's requests (server/batches)."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field, StringConstraints

from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.calling import current_caller
from manylora.server.api.dependencies import dependencies
from manylora.server.api.files import LONGEST, SHORTEST, page
from manylora.server.api.inert import Passing
from manylora.server.api.openapi import body_of
from manylora.server.api.strict import Strict

MetadataValue = Annotated[str, StringConstraints(max_length=512)]
MetadataKey = Annotated[str, StringConstraints(max_length=64)]
NOTHING = Passing(inert={}, unread=frozenset())
router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


class OutputExpiry(Strict):
    """How long the files that a batch makes are kept."""

    passing = NOTHING

    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST, le=LONGEST)


class BatchRequest(Strict):
    """POST /v1/batches."""

    passing = NOTHING

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)
    output_expires_after: OutputExpiry | None = None


@router.post("/v1/batches", openapi_extra=body_of(BatchRequest))
async def create_batch(request: Request) -> dict[str, object]:
    """Begin a batch; what is wrong with its lines is told by its status."""
    deps, caller = dependencies(request), current_caller()
    body = await read_body(request, BatchRequest)
    kept = None if body.output_expires_after is None else body.output_expires_after.seconds
    batch = await deps.batches.create(
        caller.tenant, caller.name, body.endpoint, body.input_file_id, body.metadata, kept
    )
    return batch.to_json()


@router.get("/v1/batches")
async def list_batches(
    request: Request, after: str | None = None, limit: int = Query(20, ge=1, le=100)
) -> dict[str, object]:
    """List one's own batches, the newest first."""
    found = await dependencies(request).batches.list(current_caller().tenant, after, limit + 1)
    return page([batch.to_json() for batch in found], limit)


@router.get("/v1/batches/{batch_id}")
async def get_batch(request: Request, batch_id: str) -> dict[str, object]:
    """Tell how far a batch is."""
    return (await dependencies(request).batches.get(batch_id, current_caller().tenant)).to_json()


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str) -> dict[str, object]:
    """Have a batch end with what is answered."""
    return (await dependencies(request).batches.cancel(batch_id, current_caller().tenant)).to_json()
