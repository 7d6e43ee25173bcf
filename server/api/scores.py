"""POST /score and /rerank: how near texts are to each other, by the cosine of their vectors, as vLLM has it for models
that embed."""

import time
from collections.abc import Sequence
from uuid import uuid4

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.server.api.asked_models import told_parts, with_parts
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.dependencies import dependencies
from manylora.server.api.embedding_schemas import RerankRequest, ScoreRequest
from manylora.server.api.openapi import body_of
from manylora.server.api.pooled import normalised, pooled
from manylora.server.api.rendering import json_response
from manylora.server.engine.request import Vector

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["vLLM"])


@router.post("/score", openapi_extra=body_of(ScoreRequest))
@router.post("/v1/score", openapi_extra=body_of(ScoreRequest))
async def score(request: Request) -> Response:
    """Return a score for each pair of texts, from -1 to 1, in order."""
    deps = dependencies(request)
    body = await read_body(request, ScoreRequest)
    left, right = body.sides
    found = await pooled(request, deps, body, [*left, *right], "text_1")
    ones, others = found.vectors[: len(left)], found.vectors[len(left) :]
    scores = cosines(ones * len(others) if len(ones) == 1 else ones, others)
    data = [{"index": index, "object": "score", "score": each} for index, each in enumerate(scores)]
    head = {"id": f"score-{uuid4().hex}", "object": "list", "created": int(time.time()), "model": body.model}
    answer = {**head, **told_parts(found.model), "data": data, "usage": found.usage}
    return with_parts(await json_response(lambda: answer, None), found.model)


@router.post("/rerank", openapi_extra=body_of(RerankRequest))
@router.post("/v1/rerank", openapi_extra=body_of(RerankRequest))
@router.post("/v2/rerank", openapi_extra=body_of(RerankRequest))
async def rerank(request: Request) -> Response:
    """Return the documents, the nearest to the query first."""
    deps = dependencies(request)
    body = await read_body(request, RerankRequest)
    texts = body.texts
    found = await pooled(request, deps, body, [body.query, *texts], "documents")
    query, *documents = found.vectors
    scores = cosines([query] * len(documents), documents)
    # Of equals the first that was sent comes first.
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results = [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": texts[index]}} if body.return_documents else {}),
        }
        for index in order[: body.top_n or None]
    ]
    head = {"id": f"rerank-{uuid4().hex}", "model": body.model, **told_parts(found.model)}
    answer = {**head, "results": results, "usage": found.usage}
    return with_parts(
        await json_response(lambda: answer, deps.rests if len(texts) > 64 else None), found.model
    )


def cosines(ones: Sequence[Vector], others: Sequence[Vector]) -> list[float]:
    """Return the cosine of each pair; 0 where one is all zeros."""
    return [
        float(np.clip(np.dot(normalised(one).astype(np.float64), normalised(other)), -1, 1))
        for one, other in zip(ones, others, strict=True)
    ]
