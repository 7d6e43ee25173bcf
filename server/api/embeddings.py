"""POST /v1/embeddings: a vector for each text, from the base, an adapter or a mixture."""

import base64

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.asked_models import told_parts, with_parts
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.dependencies import ApiSettings, dependencies
from manylora.server.api.embedding_schemas import EmbeddingRequest
from manylora.server.api.openapi import body_of
from manylora.server.api.pooled import Pooled, normalised, pooled
from manylora.server.api.rendering import json_response
from manylora.server.engine.request import Vector
from manylora.server.errors import InvalidRequest

ON_THE_LOOP = 4096
"""Numbers that are written where they arrive."""
router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest))
async def embeddings(request: Request) -> Response:
    """Return a vector for each input, in order."""
    deps = dependencies(request)
    body = await read_body(request, EmbeddingRequest)
    _check_dimensions(body, deps.settings)
    found = await pooled(request, deps, body, body.inputs, "input")
    large = sum(map(len, found.vectors)) > ON_THE_LOOP
    answer = await json_response(lambda: _answer(body, found), deps.rests if large else None)
    return with_parts(answer, found.model)


def _answer(body: EmbeddingRequest, found: Pooled) -> dict[str, object]:
    data = [
        {"object": "embedding", "index": index, "embedding": _written(body, vector)}
        for index, vector in enumerate(found.vectors)
    ]
    head = {"object": "list", "model": body.model, **told_parts(found.model)}
    return {**head, "data": data, "usage": found.usage}


def _written(body: EmbeddingRequest, vector: Vector) -> str | list[float]:
    told = normalised(vector, body.dimensions) if body.normalize else vector[: body.dimensions]
    if body.encoding_format == "base64":
        return base64.b64encode(told.astype("<f4").tobytes()).decode()
    numbers: list[float] = told.tolist()
    return numbers


def _check_dimensions(body: EmbeddingRequest, settings: ApiSettings) -> None:
    """Refuse vectors that the model can't give. Raises InvalidRequest."""
    asked, size = body.dimensions, settings.hidden_size
    if asked is None or asked == size:
        return
    if asked > size:
        raise InvalidRequest(f"dimensions: a vector has {size} numbers, not {asked}", param="dimensions")
    if not settings.matryoshka:
        raise InvalidRequest(
            f"dimensions: a vector of {size} numbers may be cut only if the model was trained for it (Matryoshka): "
            "leave it out, or start the server with --matryoshka",
            param="dimensions",
        )
