"""/admin/keys: make, list, change, revoke and rotate keys. A secret is told once, to whoever made it."""

from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from manylora.adapters.errors import UnknownKey
from manylora.adapters.keys import LIMITS, KeyChange, KeyRecord, KeyTerms, parse_terms
from manylora.server.api.auth import require_admin
from manylora.server.api.body import read_body
from manylora.server.api.dependencies import dependencies
from manylora.server.api.openapi import body_of
from manylora.server.api.request_context import note
from manylora.server.api.strict import Strict
from manylora.server.tenants.told import described

MOST_OVERLAP = 30 * 86400
router = APIRouter(dependencies=[Depends(require_admin)], tags=["keys"])
Limit = Annotated[int | None, Field(ge=1, lt=1 << 53)]
Room = Annotated[int | None, Field(ge=0, lt=1 << 53)]


class KeyFields(Strict):
    """What a key allows."""

    models: list[str] = Field(
        ["*"], max_length=256, description="Patterns over names: * is any characters, name@3 version 3 alone."
    )
    rights: list[str] = Field(["infer"], max_length=8, description="infer, manage, admin.")
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    parallel: Limit = Field(None, description="Requests under way at the same time.")
    budget: Limit = Field(None, description="Tokens that it may ever use.")
    weight: float = Field(1.0, ge=0.001, le=1000, description="Turns of its tenant in the queue.")
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="The least priority that it may ask for.")
    adapter_bytes: Room = Field(None, description="Bytes of its tenant's adapters.")
    adapter_rows: Room = Field(None, description="Rank rows of its tenant's adapters.")
    expires_at: str | None = Field(None, description="ISO 8601; without a zone UTC is meant.")


class KeyRequest(KeyFields):
    """POST /admin/keys. What is left out is not limited."""

    tenant: str = Field(min_length=1, max_length=64)

    @property
    def terms(self) -> KeyTerms:
        """What the key allows. Raises InvalidKey."""
        return KeyTerms(**parse_terms({name: getattr(self, name) for name in type(self).model_fields}))


class KeyUpdate(KeyFields):
    """PATCH /admin/keys/{id}. What is left out stays as it is."""

    unlimited: list[str] = Field(
        [], max_length=len(LIMITS), description=f"Limits that it is to do without: {', '.join(LIMITS)}."
    )

    @property
    def asked(self) -> dict[str, Any]:
        """What is given, as it was."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}

    @property
    def change(self) -> KeyChange:
        """What is to be others. Raises InvalidKey."""
        given = {name: value for name, value in self.asked.items() if name != "unlimited"}
        return KeyChange(parse_terms(given), self.unlimited)


class RotateRequest(Strict):
    """POST /admin/keys/{id}/rotate."""

    overlap_seconds: int = Field(
        0, ge=0, le=MOST_OVERLAP, description="How long the secret before opens too."
    )


@router.post("/admin/keys", openapi_extra=body_of(KeyRequest), status_code=201)
async def create_key(request: Request) -> JSONResponse:
    """Make a key: 201, and its secret as ``key``, this once."""
    body = await read_body(request, KeyRequest)
    record, secret = await dependencies(request).keys.create(body.terms)
    note(made=record.id)
    return _told_once(request, record, secret, 201)


@router.get("/admin/keys")
async def list_keys(request: Request) -> dict[str, object]:
    """List all keys, oldest first, those that open no more included."""
    keys = dependencies(request).keys
    await keys.load()
    return {"object": "list", "data": [described(each, keys.used(each.id)) for each in keys.records()]}


@router.get("/admin/keys/{key}")
async def get_key(request: Request, key: str) -> dict[str, object]:
    """Describe one key."""
    keys = dependencies(request).keys
    await keys.load()
    for each in keys.records():
        if each.id == key:
            return described(each, keys.used(key))
    raise UnknownKey(f"there is no key {key[:100]!r}")


@router.patch("/admin/keys/{key}", openapi_extra=body_of(KeyUpdate))
async def change_key(request: Request, key: str) -> dict[str, object]:
    """Change what a key allows, from its next request on; what it has used stays used."""
    body = await read_body(request, KeyUpdate)
    note(changed=body.asked)
    keys = dependencies(request).keys
    return described(await keys.set_terms(key, body.change), keys.used(key))


@router.delete("/admin/keys/{key}")
async def revoke_key(request: Request, key: str) -> dict[str, object]:
    """Revoke a key: what comes now is refused, what is under way goes on."""
    keys = dependencies(request).keys
    return described(await keys.revoke(key), keys.used(key))


@router.post("/admin/keys/{key}/rotate", openapi_extra=body_of(RotateRequest))
async def rotate_key(request: Request, key: str) -> JSONResponse:
    """Give a key another secret, told this once; limits and what is used stay."""
    body = await read_body(request, RotateRequest)
    overlap = timedelta(seconds=body.overlap_seconds)
    record, secret = await dependencies(request).keys.rotate(key, overlap)
    return _told_once(request, record, secret, 200)


def _told_once(request: Request, record: KeyRecord, secret: str, status: int) -> JSONResponse:
    told = {**described(record, dependencies(request).keys.used(record.id)), "key": secret}
    return JSONResponse(told, status_code=status, headers={"cache-control": "no-store"})
