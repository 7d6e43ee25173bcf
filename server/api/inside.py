"""Requests that the server makes of itself, for a batch's lines: the road of every request, without a connection."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from manylora.server.api.calling import behind_others
from manylora.server.api.dependencies import ApiSettings
from manylora.server.batches.lines import Answered
from manylora.server.tenants.caller import ADMIN_KEY, API_KEY, OPEN, Caller
from manylora.server.tenants.ring import KeyRing

CALLER = "manylora.caller"
"""In a scope: whose request that is. No connection's scope has it."""
AGAIN = frozenset({429, 503})
"""Statuses of a server that is busy."""


class Inside:
    """Asks the application. See server/batches/runner.py's Answer."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, keys: KeyRing) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys

    async def __call__(self, caller: str, path: str, body: bytes) -> Answered:
        """Answer a request for a caller of that name, behind those of connections."""
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-length", str(len(body)).encode())],
            "client": None,
            "server": None,
            CALLER: self._caller(caller),
        }
        with behind_others():
            return await _ask(self._app, scope, body)

    def _caller(self, name: str) -> Caller | str:
        """Return who that is now; a sentence: what let it in opens no more."""
        settings = self._settings
        is_open = not settings.api_keys and not self._keys.has_keys
        if name == OPEN.name:
            return OPEN if is_open else "the server asks for a key now"
        opens = {API_KEY: bool(settings.api_keys), ADMIN_KEY: settings.admin_key is not None}
        for operator, there in opens.items():
            if name == operator.name and not there:
                return OPEN if is_open else f"{name} is given no more"
            if name == operator.name:
                return operator
        return self._keys.caller_named(name)


def caller_inside(scope: MutableMapping[str, Any]) -> Caller | str | None:
    """Return whose request the server makes here; a sentence: its key opens no more; None: a connection's."""
    found: Caller | str | None = scope.get(CALLER)
    return found


async def _ask(app: ASGIApp, scope: Scope, body: bytes) -> Answered:
    status, headers, parts = 0, dict[bytes, bytes](), list[bytes]()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # nobody hangs up
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:
        if not status:  # else it was answered with a 500, and logged
            raise
    retry = headers.get(b"retry-after")
    return Answered(
        status,
        headers.get(b"x-request-id", b"").decode(),
        b"".join(parts),
        None if retry is None else float(retry),
        final=status not in AGAIN or headers.get(b"x-should-retry") == b"false",
    )
