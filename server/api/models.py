"""GET /v1/models, /tokenize and /detokenize: what can be asked, and how texts become tokens."""

from collections.abc import Sequence
from datetime import UTC, datetime

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from manylora.adapters.mixtures import MixturePart, spell
from manylora.adapters.names import AUTO
from manylora.server.api.asked_models import describe_asked, found, text_of, told_of
from manylora.server.api.asks import tokenize_prompt
from manylora.server.api.auth import require_api_key
from manylora.server.api.body import read_body
from manylora.server.api.calling import current_caller, seen_catalog
from manylora.server.api.choosing import candidates_of
from manylora.server.api.dependencies import ApiDependencies, dependencies
from manylora.server.api.disconnect import unless_gone
from manylora.server.api.openapi import body_of
from manylora.server.api.prompts import chat_tokens
from manylora.server.api.rendering import json_response
from manylora.server.api.schemas import DetokenizeRequest, TokenizeRequest
from manylora.server.api.token_ids import check_token_ids
from manylora.server.api.tokenising import check_length
from manylora.server.catalog import CatalogEntry, MixtureEntry, ResolvedModel
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import ModelText, TooManyTokens

MAX_TOKENS = 1 << 20
"""Tokens that /tokenize returns at most."""
router = APIRouter(dependencies=[Depends(require_api_key)], tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(request: Request, client_version: str | None = None) -> dict[str, object]:
    """List the base and every adapter and mixture that can answer; these name the base as their parent.

    Codex, which says its ``client_version``, reads ``models`` and nothing else: what it must know of each of those is
    its maker's own, so there are none, and it goes by what it knows.
    """
    deps = dependencies(request)
    seen = seen_catalog(deps)
    base = [base_model(deps)] if seen.kind_of(deps.settings.base_model) == "base" else []
    adapters = [adapter_model(deps, entry) for entry in seen.list() if entry.reason is None]
    mixtures = [mixture_model(deps, entry) for entry in seen.mixtures() if entry.reason is None]
    # Last: what asks for the first of them has the base.
    choice = [auto_model(deps)] if candidates_of(deps) else []
    models = [_as_asked(request, each) for each in (*base, *adapters, *mixtures, *choice)]
    listed: dict[str, object] = {"object": "list", "data": models}
    if client_version is not None:
        listed["models"] = []
    if _is_anthropics(request):
        ends = [models[place]["id"] for place in (0, -1)] if models else [None, None]
        listed |= {"first_id": ends[0], "last_id": ends[1], "has_more": False}
    return listed


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, object]:
    """Describe one model; of a mixture that a request could spell so, what that would be."""
    return _as_asked(request, _described(dependencies(request), model))


def _described(deps: ApiDependencies, model: str) -> dict[str, object]:
    seen = seen_catalog(deps)
    if model == AUTO and candidates_of(deps):
        return auto_model(deps)
    with told_of("model"):
        meant = seen.resolve(model)
    if model == deps.settings.base_model:
        return base_model(deps)
    if not meant.parts:
        return {**adapter_model(deps, seen.get(model)), "id": model}
    named = seen.get_mixture(model)
    if named is not None:
        return mixture_model(deps, named)
    parts = [MixturePart(part.name, part.weight) for part in meant.parts]
    return _mixture(deps, model, parts, deps.settings.created)


def _is_anthropics(request: Request) -> bool:
    return "anthropic-version" in request.headers


def _as_asked(request: Request, model: dict[str, object]) -> dict[str, object]:
    """Return a model object, for Anthropic's clients with what theirs have besides."""
    if not _is_anthropics(request):
        return model
    created = datetime.fromtimestamp(int(str(model["created"])), UTC).isoformat().replace("+00:00", "Z")
    return {**model, "type": "model", "display_name": model["id"], "created_at": created}


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
    """Return an adapter as a model object; as vLLM has it, its root is the path that it was loaded from.

    Whoever may use another's adapter is told its name for that: where it lies is no business of his.
    """
    name, caller = entry.record.name, current_caller()
    return {
        **base_model(deps),
        "id": name,
        "created": int(entry.record.created_at.timestamp()),
        "root": entry.record.source if caller.sees_all or caller.owns(name) else name,
        "parent": deps.settings.base_model,
    }


def auto_model(deps: ApiDependencies) -> dict[str, object]:
    """Return as a model object the name by which requests leave the choice of an adapter to the server."""
    return {**base_model(deps), "id": AUTO, "root": AUTO, "parent": deps.settings.base_model}


def mixture_model(deps: ApiDependencies, entry: MixtureEntry) -> dict[str, object]:
    """Return a mixture as a model object; its root is its parts as a request would spell them."""
    record = entry.record
    return _mixture(deps, record.name, record.parts, int(record.created_at.timestamp()))


def _mixture(
    deps: ApiDependencies, name: str, parts: Sequence[MixturePart], created: int
) -> dict[str, object]:
    return {
        **base_model(deps),
        "id": name,
        "created": created,
        "root": spell(parts),
        "parent": deps.settings.base_model,
        "mixture": [describe_asked(part) for part in parts],
    }


@router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Return the token ids of a text, or of a chat through its template."""
    deps = dependencies(request)
    body = await read_body(request, TokenizeRequest)
    model = await unless_gone(request, found(deps, body.model or deps.settings.base_model, body))
    text = await unless_gone(request, text_of(deps, model, body))
    try:
        ids = await unless_gone(request, _ids(deps, body, model, text))
    except TooManyTokens as error:
        raise InvalidRequest(
            f"the text has {error}, at most {MAX_TOKENS} are returned",
            param="prompt" if body.messages is None else "messages",
        ) from None

    def tokens() -> dict[str, object]:
        spelled = {token_id: text.vocabulary.token_text(token_id) for token_id in set(ids)}
        names = [spelled[token_id] for token_id in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": deps.settings.context_length,
            "tokens": ids,
            "token_strs": names,
        }

    return await json_response(tokens, deps.rests)


async def _ids(
    deps: ApiDependencies, body: TokenizeRequest, model: ResolvedModel, text: ModelText
) -> list[int]:
    most = deps.settings.max_tokenize_characters
    if body.messages is not None:
        return await chat_tokens(
            deps,
            model,
            text,
            tokenize_prompt(body, body.messages),
            at_most=MAX_TOKENS,
            lane=deps.tokenising.looks,
            most=most,
        )
    prompt, special = body.prompt or "", body.add_special_tokens
    check_length(len(prompt), most, "prompt")
    [ids] = await text.codec.encode(
        deps.tokenising.looks, [prompt], add_special_tokens=special, at_most=MAX_TOKENS
    )
    return ids


@router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Return the text of token ids, control tokens spelled out."""
    deps = dependencies(request)
    body = await read_body(request, DetokenizeRequest)
    model = await unless_gone(request, found(deps, body.model or deps.settings.base_model, body))
    looks, tokens = deps.tokenising.looks, body.tokens
    text = await unless_gone(request, text_of(deps, model, body))
    size = text.own_size or deps.settings.vocab_size
    await unless_gone(request, looks.run(lambda: check_token_ids(tokens, size, "tokens"), len(tokens)))
    spelled = await unless_gone(request, text.codec.spell(looks, tokens))
    return await json_response(lambda: {"prompt": spelled}, deps.rests)
