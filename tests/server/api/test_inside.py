"""Whose a batch's lines are: they pass the door as its maker would now."""

from dataclasses import replace
from typing import cast

import pytest
from starlette.types import Receive, Scope, Send

from manylora.server.api.dependencies import ApiSettings
from manylora.server.api.inside import Inside, caller_inside
from manylora.server.tenants.caller import ADMIN_KEY, API_KEY, LOCAL, OPEN, Caller
from manylora.server.tenants.ring import KeyRing

NONE = ApiSettings("tiny", context_length=64, vocab_size=256)
KEYS = replace(NONE, api_keys=("k",), admin_key="boss")
CLOSED = "a sentence"


class Ring:
    """Of keys that are gone."""

    def __init__(self, *, has_keys: bool) -> None:
        self.has_keys = has_keys

    def caller_named(self, key_id: str) -> str:
        return f"{key_id} is gone"


async def asked_as(name: str, settings: ApiSettings, *, has_keys: bool) -> Caller | str:
    seen: list[Caller | str | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(caller_inside(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    inside = Inside(app, settings, cast(KeyRing, Ring(has_keys=has_keys)))
    await inside(name, "/v1/completions", b"{}")
    (found,) = seen
    assert found is not None
    return CLOSED if isinstance(found, str) else found


@pytest.mark.parametrize(
    ("name", "settings", "has_keys", "caller"),
    [
        (OPEN.name, NONE, False, OPEN),
        (OPEN.name, NONE, True, CLOSED),
        (OPEN.name, KEYS, False, CLOSED),
        (OPEN.name, replace(NONE, admin_key="boss"), False, OPEN),
        (API_KEY.name, KEYS, True, API_KEY),
        (API_KEY.name, NONE, True, CLOSED),
        (API_KEY.name, replace(NONE, admin_key="boss"), True, CLOSED),
        (API_KEY.name, NONE, False, OPEN),
        (ADMIN_KEY.name, KEYS, True, ADMIN_KEY),
        (ADMIN_KEY.name, replace(KEYS, admin_key=None), True, CLOSED),
        (ADMIN_KEY.name, NONE, False, OPEN),
        (LOCAL.name, NONE, True, CLOSED),
        ("key-0", KEYS, True, CLOSED),
    ],
)
async def test_a_line_opens_what_its_maker_would(
    name: str, settings: ApiSettings, has_keys: bool, caller: Caller | str
) -> None:
    assert await asked_as(name, settings, has_keys=has_keys) == caller
