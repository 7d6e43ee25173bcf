"""Who may call what: --api-key for /v1, --admin-key for what changes the server; in constant time."""

import hmac
from collections.abc import Iterable

from fastapi import Request

from manylora.server.api.dependencies import dependencies
from manylora.server.api.local_callers import require_local
from manylora.server.errors import Unauthorized


async def require_api_key(request: Request) -> None:
    """Let a /v1 request through if no key is set or it carries one of them, the admin key included."""
    settings = dependencies(request).settings
    if settings.api_keys:
        admin = () if settings.admin_key is None else (settings.admin_key,)
        _require(request, (*settings.api_keys, *admin))


async def require_admin(request: Request) -> None:
    """Let an admin request through: with the admin key, or from this machine when none is set."""
    settings = dependencies(request).settings
    if settings.admin_key is not None:
        _require(request, (settings.admin_key,))
        return
    require_local(request, settings)


def _require(request: Request, keys: Iterable[str]) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers arrive as bytes, which starlette reads as Latin-1.
    token = given.encode("latin-1") if scheme.lower() == "bearer" else b""
    # Every key is compared, so that the time doesn't tell which one came near.
    matches = [hmac.compare_digest(token, key.encode()) for key in keys]
    if not any(matches):
        said = "Incorrect API key provided" if token else "No API key provided"
        raise Unauthorized(f"{said}: send it as 'Authorization: Bearer KEY'")
