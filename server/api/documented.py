"""What each route may answer, for /openapi.json: one table, which a test holds against the routes and their answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from manylora.server.api import (
    answers,
    anthropic_answers,
    batch_answers,
    chat_answers,
    embedding_answers,
    key_answers,
    response_answers,
)

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
ERRORS: dict[int, str] = {
    400: "Something in the request is wrong, unknown or can't be honoured; or it is no HTTP",
    401: "The key is missing or wrong",
    403: "The route is closed to this caller, its namespace is full, or the source leads out of the adapter root",
    404: "There is nothing of that name",
    408: "The request took too long to arrive",
    409: "Other weights, or other parts, have the name, or its versions don't allow that change",
    413: "The body is over a limit",
    414: "The head is over a limit, and most of it is path and query",
    429: "Too much waits already, or the key is over a limit or its budget",
    431: "The head is over a limit",
    500: "A fault of the server's",
    503: "The server, or the adapter, can't serve this now",
    507: "The disk is full",
}
ANYWHERE = frozenset({400, 408, 414, 431, 500, 503})
"""Before a route is reached, or whatever it does."""
BODY, CHANGES, GENERATES = frozenset({413}), frozenset({507}), frozenset({404, 413, 429, 507})


@dataclass(frozen=True, slots=True)
class Documented:
    """What a route may answer."""

    door: Literal["open", "api", "admin"]
    answers: Mapping[int, Mapping[str, type[BaseModel] | None]]
    """By status and media type; None: a text, or bytes."""
    errors: frozenset[int] = field(default_factory=frozenset)
    """Besides those that any route may answer."""

    @property
    def models(self) -> set[type[BaseModel]]:
        """The answers that are objects."""
        return {model for media in self.answers.values() for model in media.values() if model is not None}

    def all_errors(self, method: str) -> list[int]:
        """Return every status over 400; ``method`` in small letters."""
        # Who manages a namespace is limited in what it changes, not in what it reads.
        limited = set() if method == "get" else {429}
        door = {"open": set(), "api": {401, 403, 429}, "admin": {401, 403, *limited}}[self.door]
        return sorted(self.errors | ANYWHERE | door)


def _one(
    door: Literal["open", "api", "admin"],
    model: type[BaseModel],
    errors: frozenset[int] = frozenset(),
    status: int = 200,
) -> Documented:
    return Documented(door, {status: {JSON: model}}, errors)


NAMED = frozenset({404})
RESULT = Documented(
    "admin",
    {200: {"application/gzip": None, "application/x-tar": None, "application/octet-stream": None}},
    NAMED,
)
OPERATIONS: dict[tuple[str, str], Documented] = {
    ("get", "/health"): _one("open", answers.Alive),
    ("get", "/ready"): Documented("open", {200: {JSON: answers.Ready}, 503: {JSON: answers.NotReady}}),
    ("get", "/metrics"): Documented("open", {200: {TEXT: None}}),
    ("get", "/v1/models"): _one("api", answers.Models),
    ("get", "/v1/models/{model}"): _one("api", answers.Model, NAMED),
    ("post", "/tokenize"): _one("api", answers.Tokens, BODY | NAMED),
    ("post", "/detokenize"): _one("api", answers.Text, BODY | NAMED),
    ("post", "/v1/chat/completions"): Documented(
        "api", {200: {JSON: chat_answers.ChatCompletion, EVENTS: chat_answers.ChatCompletionChunk}}, GENERATES
    ),
    ("post", "/v1/completions"): Documented(
        "api", {200: {JSON: answers.Completion, EVENTS: answers.CompletionChunk}}, GENERATES
    ),
    ("post", "/v1/responses"): Documented(
        "api",
        {200: {JSON: response_answers.ModelResponse, EVENTS: response_answers.ResponseEvent}},
        GENERATES,
    ),
    ("post", "/v1/messages"): Documented(
        "api",
        {200: {JSON: anthropic_answers.AnthropicMessage, EVENTS: anthropic_answers.MessageEvent}},
        GENERATES,
    ),
    ("post", "/v1/messages/count_tokens"): _one("api", anthropic_answers.CountedTokens, BODY | NAMED),
    ("post", "/v1/embeddings"): _one("api", embedding_answers.Embeddings, GENERATES),
    **{("post", path): _one("api", embedding_answers.Scores, GENERATES) for path in ("/score", "/v1/score")},
    **{
        ("post", path): _one("api", embedding_answers.Reranked, GENERATES)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    },
    ("post", "/v1/files"): _one("api", batch_answers.File, BODY | CHANGES | {429}),
    ("get", "/v1/files"): _one("api", batch_answers.Files, NAMED),
    ("get", "/v1/files/{file_id}"): _one("api", batch_answers.File, NAMED),
    ("delete", "/v1/files/{file_id}"): _one("api", batch_answers.DeletedFile, NAMED | CHANGES),
    ("get", "/v1/files/{file_id}/content"): Documented(
        "api", {200: {"application/octet-stream": None}}, NAMED
    ),
    ("post", "/v1/batches"): _one("api", batch_answers.Batch, BODY | CHANGES | {429}),
    ("get", "/v1/batches"): _one("api", batch_answers.BatchPage, NAMED),
    ("get", "/v1/batches/{batch_id}"): _one("api", batch_answers.Batch, NAMED),
    ("post", "/v1/batches/{batch_id}/cancel"): _one("api", batch_answers.Batch, NAMED | CHANGES | {429}),
    ("post", "/adapters"): Documented(
        "admin",
        {
            200: {JSON: answers.RegisteredModel},
            201: {JSON: answers.RegisteredModel},
            202: {JSON: answers.Registration},
        },
        NAMED | BODY | CHANGES | {409},
    ),
    ("get", "/adapters"): _one("admin", answers.Adapters),
    ("get", "/adapters/{name}"): _one("admin", answers.ManagedModel, NAMED),
    ("put", "/adapters/{name}"): Documented(
        "admin",
        {200: {JSON: answers.RegisteredModel}, 202: {JSON: answers.Registration}},
        NAMED | BODY | CHANGES | {409},
    ),
    ("patch", "/adapters/{name}"): _one("admin", answers.Adapter, NAMED | BODY | CHANGES),
    ("delete", "/adapters/{name}"): _one("admin", answers.DeletedModel, NAMED | CHANGES),
    ("get", "/adapters/{name}/versions"): _one("admin", answers.Versions, NAMED),
    ("delete", "/adapters/{name}/versions/{version}"): _one(
        "admin", answers.Versions, NAMED | CHANGES | {409}
    ),
    ("post", "/adapters/{name}/rollback"): _one("admin", answers.Versions, NAMED | BODY | CHANGES | {409}),
    ("post", "/adapters/{name}/canary"): Documented(
        "admin",
        {
            200: {JSON: answers.Versions},
            201: {JSON: answers.Versions},
            202: {JSON: answers.Registration},
        },
        NAMED | BODY | CHANGES | {409},
    ),
    ("post", "/adapters/{name}/canary/promote"): _one("admin", answers.Versions, NAMED | CHANGES | {409}),
    ("delete", "/adapters/{name}/canary"): _one("admin", answers.Versions, NAMED | CHANGES | {409}),
    ("post", "/v1/load_lora_adapter"): Documented("admin", {200: {TEXT: None}}, NAMED | BODY | CHANGES),
    ("post", "/v1/unload_lora_adapter"): Documented("admin", {200: {TEXT: None}}, NAMED | BODY | CHANGES),
    ("post", "/admin/keys"): _one("admin", key_answers.NewKey, BODY | CHANGES, 201),
    ("get", "/admin/keys"): _one("admin", key_answers.Keys),
    ("get", "/admin/keys/{key}"): _one("admin", key_answers.Key, NAMED),
    ("patch", "/admin/keys/{key}"): _one("admin", key_answers.Key, NAMED | BODY | CHANGES),
    ("delete", "/admin/keys/{key}"): _one("admin", key_answers.Key, NAMED | CHANGES),
    ("post", "/admin/keys/{key}/rotate"): _one("admin", key_answers.NewKey, NAMED | BODY | CHANGES),
    ("post", "/adapters/{name}/export"): _one("admin", answers.Export, NAMED | BODY | {429}, 202),
    ("post", "/exports"): _one("admin", answers.Export, NAMED | BODY | {429}, 202),
    ("get", "/exports"): _one("admin", answers.Exports),
    ("get", "/exports/{job}"): _one("admin", answers.Export, NAMED),
    ("delete", "/exports/{job}"): _one("admin", answers.Export, NAMED),
    ("get", "/exports/{job}/download"): RESULT,
    ("get", "/adapters/{name}/export/{job}"): _one("admin", answers.Export, NAMED),
    ("delete", "/adapters/{name}/export/{job}"): _one("admin", answers.Export, NAMED),
    ("get", "/adapters/{name}/export/{job}/download"): RESULT,
}
