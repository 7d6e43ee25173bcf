"""Keys in answers, as /openapi.json describes them."""

from typing import Literal

from pydantic import Field

from manylora.server.api.answer import Answer


class Key(Answer):
    """An API key: all but its secret."""

    object: Literal["key"]
    id: str
    tenant: str
    state: Literal["active", "expired", "revoked"]
    hint: str = Field(description="The secret's last characters.")
    models: list[str]
    rights: list[Literal["infer", "manage", "admin"]]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    parallel: int | None
    budget: int | None
    used: int = Field(description="Tokens of the budget.")
    weight: float
    priority: int
    adapter_bytes: int | None
    adapter_rows: int | None
    created: int
    expires: int | None
    revoked: int | None


class NewKey(Key):
    """A key with its secret, which is told this once."""

    key: str


class Keys(Answer):
    """All keys, those that open no more included."""

    object: Literal["list"]
    data: list[Key]
