"""One place where errors become HTTP: OpenAI's envelope, found by the error's class, nearest first."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Scope
from structlog import get_logger

from manylora.adapters import errors as adapter_errors
from manylora.server.api.anthropic_errors import in_anthropics_shape, is_anthropics
from manylora.server.api.disconnect import ClientGone
from manylora.server.api.inert import LONGEST_NAME, REFUSED_FIELD
from manylora.server.api.request_context import CLIENT_GONE, note, request_id
from manylora.server.errors import InvalidRequest, ServerError

log = get_logger(__name__)
INVALID = "invalid_request_error"
LONGEST_WAIT = 120
"""Seconds of Retry-After."""
NOT_AGAIN = frozenset({409, 507})
"""Statuses that OpenAI's clients answer with the same request, twice, which changes nothing here."""
_UNION_MEMBER = re.compile(r"list\[|literal\[|function-|str$|ToolChoice$")
"""What pydantic puts into a field's path for the alternative that it tried."""
UNEXPECTED = "The server failed on this request. The fault is logged under the request id."


@dataclass(frozen=True, slots=True)
class Shape:
    """How a class of errors looks from outside."""

    status: int
    type: str
    code: str | None


# Errors of rooms that know nothing of HTTP. manylora.server.errors carry their own.
FOREIGN: dict[type[Exception], Shape] = {
    adapter_errors.AdapterNotFound: Shape(400, INVALID, "adapter_not_found"),
    adapter_errors.AdapterPathForbidden: Shape(403, INVALID, "adapter_path_forbidden"),
    adapter_errors.SourceForbidden: Shape(403, INVALID, "source_forbidden"),
    adapter_errors.SourceUnreachable: Shape(503, "server_error", "source_unreachable"),
    adapter_errors.InvalidAdapter: Shape(400, INVALID, "invalid_adapter"),
    adapter_errors.UnsupportedAdapter: Shape(400, INVALID, "unsupported_adapter"),
    adapter_errors.InvalidMixture: Shape(400, INVALID, "invalid_mixture"),
    adapter_errors.AdapterNameTaken: Shape(409, INVALID, "adapter_name_taken"),
    adapter_errors.UnknownAdapter: Shape(404, INVALID, "model_not_found"),
    adapter_errors.UnknownVersion: Shape(404, INVALID, "version_not_found"),
    adapter_errors.VersionConflict: Shape(409, INVALID, "version_conflict"),
    adapter_errors.InvalidKey: Shape(400, INVALID, "invalid_key"),
    adapter_errors.UnknownKey: Shape(404, INVALID, "key_not_found"),
    adapter_errors.StoreFull: Shape(507, "server_error", "store_full"),
    adapter_errors.RegistryBusy: Shape(503, "server_error", "registry_busy"),
    # What has no class of its own is a fault of the registry or of a disk, not of the request.
    adapter_errors.AdapterError: Shape(500, "server_error", "storage_failed"),
}


def shape_of(error: BaseException) -> Shape:
    """Return how an error looks: its own, its nearest class's in the table, or a plain 500."""
    if isinstance(error, ServerError):
        return Shape(error.status, error.type, error.code)
    for kind in type(error).__mro__:
        if kind in FOREIGN:
            return FOREIGN[kind]
    return Shape(500, "server_error", "internal_error")


def message_of(error: BaseException) -> str:
    """Return what a client is told of an error; of one that nobody expected, that alone."""
    known = isinstance(error, ServerError) or shape_of(error).code != "internal_error"
    # Whatever is quoted, the answer is text.
    return str(error).encode(errors="backslashreplace").decode() if known else UNEXPECTED


def envelope(error: BaseException) -> dict[str, object]:
    """Return OpenAI's error object, and have it logged; an unexpected error tells nothing of itself."""
    shape, message = shape_of(error), message_of(error)
    param = error.param if isinstance(error, ServerError) else None
    body = {"message": message, "type": shape.type, "param": param, "code": shape.code}
    note(code=shape.code, reason=message)
    return {"error": body, "request_id": request_id()}


def error_response(error: Exception, path: str = "") -> JSONResponse:
    """Return the response for an error, Retry-After and WWW-Authenticate included; ``path`` is whose error it is."""
    shape = shape_of(error)
    headers = {}
    if isinstance(error, ServerError) and error.retry_after is not None:
        # Clients give up at once when they are to wait longer than LONGEST_WAIT.
        headers["retry-after"] = str(max(1, min(LONGEST_WAIT, math.ceil(error.retry_after))))
    if shape.status in NOT_AGAIN or (isinstance(error, ServerError) and error.should_retry is False):
        headers["x-should-retry"] = "false"
    if shape.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _enveloped(envelope(error), shape.status, headers, path)


def _enveloped(
    content: Mapping[str, object], status: int, headers: Mapping[str, str], path: str
) -> JSONResponse:
    told = in_anthropics_shape(content, status) if is_anthropics(path) else content
    return JSONResponse(told, status_code=status, headers=dict(headers))


def invalid_field(error: ValidationError) -> InvalidRequest:
    """Turn pydantic's first finding into one sentence that names the field."""
    found = error.errors(include_url=False, include_input=False)
    # Of a union's alternatives, the one that got furthest is what was meant.
    of_first_field = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    first = max(of_first_field, key=lambda each: len(each["loc"]))
    parts = [str(part) for part in first["loc"] if not _UNION_MEMBER.match(str(part))]
    if first["type"] == REFUSED_FIELD:
        parts.append(first["ctx"]["name"][:LONGEST_NAME])
    path = ".".join(parts)
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{path}: {message}" if path else message, param=path or None)


def allowed_methods(app: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of all routes of this path: starlette names those of the first alone."""
    here = [route for route in app.routes if route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in here for method in getattr(route, "methods", None) or ()})


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in the envelope."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request.url.path)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = "not_found" if error.status_code == 404 else "method_not_allowed"
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = {"message": message, "type": INVALID, "param": None, "code": code}
        note(code=code, reason=message)
        content = {"error": body, "request_id": request_id()}
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        if error.status_code == 405:
            headers["allow"] = ", ".join(allowed_methods(app, request.scope))
        return _enveloped(content, error.status_code, headers, request.url.path)

    async def query(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return error_response(InvalidRequest(f"{name}: {first['msg']}", param=name), request.url.path)

    async def gone(request: Request, error: Exception) -> Response:
        note(reason="the client hung up")
        return Response(status_code=CLIENT_GONE)

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again once the answer is sent, so it reaches logs and tests.
        log.error("unexpected error", path=request.url.path, exc_info=error)
        return error_response(error, request.url.path)

    app.add_exception_handler(ServerError, known)
    for kind in FOREIGN:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, query)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(ClientDisconnect, gone)  # while its body was read
    app.add_exception_handler(Exception, unexpected)
