"""GET /v1/models, /tokenize and /detokenize: what can be asked, and how texts become tokens."""

import asyncio

from fastapi import APIRouter, Depends, Request

from server.api.auth import require_api_key
from server.api.body import read_body
from server.api.dependencies import ApiDependencies, dependencies
from server.api.generation import check_token_ids
from server.api.openapi import body_of
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.catalog import CatalogEntry

router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, object]:
    """List the base and every adapter that can answer; adapters name the base as their parent."""
    deps = dependencies(request)
    adapters = [adapter_model(deps, entry) for entry in deps.catalog.list() if entry.reason is None]
    return {"object": "list", "data": [base_model(deps), *adapters]}


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, object]:
    """Describe one model."""
    deps = dependencies(request)
    deps.catalog.resolve(model)
    if model == deps.settings.base_model:
        return base_model(deps)
    return adapter_model(deps, deps.catalog.get(model))


def base_model(deps: ApiDependencies) -> dict[str, object]:
    """Return the base as a model object."""
    name = deps.settings.base_model
    return {
        "id": name,
        "object": "model",
        "created": deps.settings.created,
        "owned_by": "manylora",
        "root": name,
        "parent": None,
        "max_model_len": deps.settings.context_length,
    }


def adapter_model(deps: ApiDependencies, entry: CatalogEntry) -> dict[str, object]:
    """Return an adapter as a model object."""
    return {
        **base_model(deps),
        "id": entry.record.name,
        "created": int(entry.record.created_at.timestamp()),
        "root": entry.record.source,
        "parent": deps.settings.base_model,
    }


@router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
async def tokenize(request: Request) -> dict[str, object]:
    """Return the token ids of a text, or of a chat through its template."""
    deps = dependencies(request)
    body = await read_body(request, TokenizeRequest)
    template = None if body.model is None else deps.catalog.resolve(body.model).chat_template
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        ids = await asyncio.to_thread(
            deps.tokenizer.apply_chat_template,
            messages,
            chat_template=template,
            add_generation_prompt=body.add_generation_prompt,
        )
    else:
        encode = deps.tokenizer.encode
        ids = await asyncio.to_thread(encode, body.prompt or "", add_special_tokens=body.add_special_tokens)
    texts = [deps.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": deps.settings.context_length,
        "tokens": ids,
        "token_strs": texts,
    }


@router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request) -> dict[str, object]:
    """Return the text of token ids."""
    deps = dependencies(request)
    body = await read_body(request, DetokenizeRequest)
    if body.model is not None:
        deps.catalog.resolve(body.model)
    check_token_ids(body.tokens, deps.settings.vocab_size, "tokens")
    return {"prompt": await asyncio.to_thread(deps.tokenizer.decode, body.tokens)}
