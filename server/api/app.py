"""The application: routes, errors, request ids, CORS. What it needs is handed in; nothing is global."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from copy import copy
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.types import ASGIApp

from manylora.server.api import (
    adapter_versions,
    adapters,
    anthropic_messages,
    batches,
    chat,
    completions,
    docs_page,
    embeddings,
    export,
    files,
    health,
    keys,
    models,
    responses,
    scores,
)
from manylora.server.api.asked_models import ANSWERS_HEADER, CHOICE_HEADER
from manylora.server.api.asked_models import HEADER as PARTS_HEADER
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.error_responses import install_error_handlers
from manylora.server.api.example_reading import vectors_of
from manylora.server.api.inside import Inside
from manylora.server.api.openapi import document
from manylora.server.api.pacing import Paced
from manylora.server.api.rate_headers import NAMES as RATES
from manylora.server.api.request_context import RequestContext
from manylora.server.memory import give_back

PAUSE_SECONDS = 3.0
"""Without anything asked or generated, after which freed memory goes back to the system."""
EXPOSED = ("x-request-id", "retry-after", "x-should-retry", "openai-processing-ms", "openai-version")
"""Headers that pages may read, besides those of limits."""
Application = RequestContext
"""What an ASGI server runs."""


class _Described(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Return what create_app wrote down."""
        description: dict[str, Any] = self.state.description
        return description


def create_app(deps: ApiDependencies, version: str) -> Application:
    """Return the application that serves ``deps``."""
    app = _Described(
        title="manylora",
        version=version,
        description="One 4-bit base model, many LoRA adapters, the OpenAI API.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.dependencies = deps
    # Before adapters, whose names may hold slashes.
    for module in (
        docs_page,
        health,
        models,
        chat,
        completions,
        responses,
        anthropic_messages,
        embeddings,
        scores,
        files,
        batches,
        keys,
        export,
        adapter_versions,
        adapters,
    ):
        app.router.routes.extend(copy(route) for route in module.router.routes)
    # Before there is a HEAD to each GET: it would be listed.
    app.state.description = document(app, deps.settings)
    for route in app.routes:
        if isinstance(route, APIRoute) and "GET" in (methods := route.methods or set()):
            route.methods = {*methods, "HEAD"}
    install_error_handlers(app)
    # Around the app and not in it, so that unexpected errors have CORS headers and the request id too.
    paced = Paced(_with_cors(app, deps.settings.cors_origins), lambda: deps.engine.tempo)
    application = RequestContext(paced, deps.metrics.http)
    app.state.inside = Inside(application, deps.settings, deps.keys)
    return application


def _with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[*EXPOSED, *RATES, PARTS_HEADER, ANSWERS_HEADER, CHOICE_HEADER],
    )


async def give_back_in_pauses(deps: ApiDependencies, pause: float = PAUSE_SECONDS) -> None:
    """Give the system the memory that requests have left free, whenever nothing was asked or made for ``pause`` s."""
    given_back, before = 0, deps.metrics.http.served
    while True:
        await asyncio.sleep(pause)
        now = deps.metrics.http.served
        if now == before != given_back and deps.engine.tempo is None:
            await asyncio.to_thread(give_back)
            given_back = now
        before = now


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the export jobs as long as the server, and end what renders templates with it."""
    # What is loaded leaves the garbage collector's rounds: a full one would hold the loop for 100 ms.
    gc.collect()
    gc.freeze()
    deps: ApiDependencies = app.state.dependencies
    await deps.keys.load()
    if deps.exports is not None:
        await deps.exports.open()
    if deps.routing is not None:
        names = [entry.record.name for entry in deps.catalog.list()]
        await deps.routing.open(names, deps.catalog.described, partial(vectors_of, deps))
    await deps.batches.open(app.state.inside)
    pauses = asyncio.create_task(give_back_in_pauses(deps))
    async with deps.keys.followed():
        try:
            yield
        finally:
            # Before the keys' books are closed: its lines spend tokens until then.
            await deps.batches.close()
    pauses.cancel()
    if deps.routing is not None:
        await deps.routing.close()
    deps.texts.close()
    deps.tokenising.close()
    if deps.grammars is not None:
        deps.grammars.close()
    if deps.audit is not None:
        await asyncio.to_thread(deps.audit.close)
    if deps.exports is not None:
        await deps.exports.close()
