"""The application: routes, errors, request ids, CORS. What it needs is handed in; nothing is global."""

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server.api import adapters, chat, completions, health, models
from server.api.dependencies import ApiDependencies
from server.api.error_responses import install_error_handlers
from server.api.request_context import RequestContext

Application = RequestContext
"""What an ASGI server runs."""


def create_app(deps: ApiDependencies, version: str) -> Application:
    """Return the application that serves ``deps``."""
    app = FastAPI(
        title="manylora",
        version=version,
        description="One 4-bit base model, many LoRA adapters, the OpenAI API.",
    )
    app.state.dependencies = deps
    for module in (health, models, chat, completions, adapters):
        app.include_router(module.router)
    install_error_handlers(app)
    if deps.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(deps.settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    # Outermost, so that unexpected errors carry the id too.
    return RequestContext(app)
