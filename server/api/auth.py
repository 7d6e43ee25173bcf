"""Who may call what: --api-key for /v1, --admin-key for what changes the server; in constant time."""

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import Request

from manylora.server.api.dependencies import dependencies
from manylora.server.errors import Forbidden, Unauthorized


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
    if settings.listens_beyond_loopback and not _from_loopback(request):
        raise Forbidden("adapters are managed from this machine only: start with --admin-key to allow others")
    # Any web page that someone on this machine looks at can send requests here; browsers say whose they are.
    origin = request.headers.get("origin")
    if origin is not None and origin not in settings.cors_origins and not _is_loopback(_host_of(origin)):
        raise Forbidden("adapters are not managed from web pages: name the page with --cors-origin")


def _require(request: Request, keys: Iterable[str]) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers arrive as bytes, which starlette reads as Latin-1.
    token = given.encode("latin-1") if scheme.lower() == "bearer" else b""
    # Every key is compared, so that the time doesn't tell which one came near.
    matches = [hmac.compare_digest(token, key.encode()) for key in keys]
    if not any(matches):
        said = "Incorrect API key provided" if token else "No API key provided"
        raise Unauthorized(f"{said}: send it as 'Authorization: Bearer KEY'")


def _from_loopback(request: Request) -> bool:
    return request.client is not None and _is_loopback(request.client.host)


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
