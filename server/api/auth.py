"""Who may call what: found once for each request, in constant time, and kept for everything behind (calling.py).

--api-key opens /v1, --admin-key what changes the server, and the registry's keys what they say. A key goes into
``authorization: Bearer KEY`` or, as Anthropic's clients send it, ``x-api-key``.
"""

import hmac
import time
from collections.abc import Iterable

from fastapi import Request

from manylora.adapters.keys import Right
from manylora.server.api.audit import READING, STRANGER, audited
from manylora.server.api.calling import set_caller, set_ticket
from manylora.server.api.dependencies import ApiDependencies, dependencies
from manylora.server.api.inside import caller_inside
from manylora.server.api.local_callers import require_local
from manylora.server.api.rate_headers import headers_of
from manylora.server.api.request_context import at_end, note, with_headers
from manylora.server.errors import Forbidden, Unauthorized
from manylora.server.tenants.account import Account
from manylora.server.tenants.caller import ADMIN_KEY, API_KEY, LOCAL, OPEN, Caller

_OPERATOR = "who runs the server may, with its admin key or a key that has the right to admin"
_EXPORTS = (
    "this key may not export: a merged model holds the base's weights, which a tenant asks and doesn't have, and"
    f" results take disk that no quota bounds; {_OPERATOR}"
)


async def require_api_key(request: Request) -> None:
    """Let a /v1 request through: with a key of --api-key or the registry's, or the admin key; if there is none, any.

    What is posted counts as a request of its key from here until the answer is over.
    """
    deps = dependencies(request)
    caller = caller_inside(request.scope)
    if isinstance(caller, str):
        raise _closed(caller)
    if caller is None:
        caller = await _caller_of(deps, _secret(request))
    if caller is None:
        if deps.settings.api_keys or deps.keys.has_keys:
            raise _refusal(request)
        caller = OPEN
    if not caller.may(Right.INFER):
        raise Forbidden("this key may not ask models: it has no right to infer")
    _pass(caller)
    if caller.account is not None and request.method == "POST":
        _enter(caller.account)


async def require_admin(request: Request) -> None:
    """Let an admin request through: with the admin key or one that may administer, or from this machine."""
    await _require(request, Right.ADMIN)


async def require_exporter(request: Request) -> None:
    """Let through who may administer, as ``require_admin``; a tenant is told why not, and who may."""
    await _require(request, Right.ADMIN, _EXPORTS)


async def require_manager(request: Request) -> None:
    """Let through who may administer, and who may manage a namespace: what that is, the route must ask."""
    await _require(request, Right.MANAGE)


async def _require(request: Request, right: Right, refusal: str = "") -> None:
    """Let through who has a right; ``refusal`` is said to a key that hasn't, if there is more to say than that."""
    deps, secret = dependencies(request), _secret(request)
    caller: Caller | None = None
    try:
        caller = await _caller_of(deps, secret)
        if caller is None or caller is API_KEY:
            if deps.settings.admin_key is not None:
                raise _refusal(request)
            require_local(request, deps.settings)
            caller = LOCAL
    except (Unauthorized, Forbidden):
        who = deps.keys.id_of(secret) if caller is None else caller.name
        audited(request, deps.audit, who or STRANGER, let_in=False)
        raise
    _pass(caller)
    audited(request, deps.audit, caller.name, caller.tenant)
    if not caller.may(right):
        raise Forbidden(refusal or f"this key may not do that: it has no right to {right.value}; {_OPERATOR}")
    if caller.account is not None and request.method not in READING:
        _enter(caller.account, asks=False)


async def watcher(request: Request) -> Caller | None:
    """Return who reads what is open to all but names nobody's adapters to strangers; None: a stranger.

    Without keys nobody is one. With keys, who runs the server isn't, and a tenant's key is told of its own.
    """
    deps = dependencies(request)
    try:
        caller = await _caller_of(deps, _secret(request))
    except Unauthorized:
        return None
    if caller is not None or not deps.keys.has_keys:
        return caller or OPEN
    if deps.settings.admin_key is None:
        try:
            require_local(request, deps.settings)
        except Forbidden:
            return None
        return LOCAL
    return None


def _enter(account: Account, *, asks: bool = True) -> None:
    """Count a request of a key from here until its answer is over; one that doesn't ask models uses no budget."""
    with_headers(lambda: headers_of(account, time.monotonic()))
    ticket = account.enter(time.monotonic(), asks=asks)
    at_end(lambda status: ticket.close())
    set_ticket(ticket)


def _pass(caller: Caller) -> None:
    set_caller(caller)
    if caller.tenant:
        note(tenant=caller.tenant, key=caller.name)


async def _caller_of(deps: ApiDependencies, secret: bytes) -> Caller | None:
    """Return whose secret that is; None: nobody's. Raises Unauthorized for a key that opens no more."""
    if not secret:
        return None
    settings = deps.settings
    # Both are compared to the end, so that the time doesn't tell which one came near.
    admin = _is_one_of(secret, () if settings.admin_key is None else (settings.admin_key,))
    plain = _is_one_of(secret, settings.api_keys)
    if admin or plain:
        return ADMIN_KEY if admin else API_KEY
    found = await deps.keys.caller_of(secret)
    if isinstance(found, str):
        raise _closed(found)
    return found


def _is_one_of(secret: bytes, keys: Iterable[str]) -> bool:
    matches = [hmac.compare_digest(secret, key.encode()) for key in keys]
    return any(matches)


def _secret(request: Request) -> bytes:
    """Return the key that a request carries; nothing: none."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("x-api-key", "")
    # Headers arrive as bytes, which starlette reads as Latin-1.
    return given.encode("latin-1")


def _closed(why: str) -> Unauthorized:
    return Unauthorized(f"{why}: ask whoever runs this server for another one")


def _refusal(request: Request) -> Unauthorized:
    said = "Incorrect API key provided" if _secret(request) else "No API key provided"
    return Unauthorized(f"{said}: send it as 'Authorization: Bearer KEY'")
