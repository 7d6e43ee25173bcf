"""A server with keys: two tenants, what belongs to nobody, and what belongs to each."""

from typing import Any

import httpx

from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.server.api.running import BASE, Files, Running

ADMIN = "boss"


def write_folders(files: Files) -> None:
    """Write adapters into folders of tenants: acme/x and acme/y, globex/secret."""
    for name, rank in (("acme/x", 4), ("acme/y", 8), ("globex/secret", 4)):
        if not (files.adapters / name).exists():
            write_adapter(files.adapters / name, files.base, AdapterShape(rank=rank, seed=rank))


def call(
    server: Running, method: str, path: str, key: str | None, body: object = None, **headers: str
) -> httpx.Response:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return httpx.request(method, server.url + path, headers=headers, json=body, timeout=30)


def new_key(server: Running, tenant: str, **terms: object) -> str:
    """Return the secret of a new key."""
    made = call(server, "POST", "/admin/keys", ADMIN, {"tenant": tenant, **terms})
    assert made.status_code == 201, made.text
    secret: str = made.json()["key"]
    return secret


def complete(server: Running, key: str | None, model: str = BASE, **fields: object) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "prompt": "hello there", "max_tokens": 4, "ignore_eos": True}
    return call(server, "POST", "/v1/completions", key, {**body, **fields})


def names(server: Running, key: str) -> set[str]:
    """Return the models that a key sees."""
    answer = call(server, "GET", "/v1/models", key)
    assert answer.status_code == 200, answer.text
    return {each["id"] for each in answer.json()["data"]}


def error(answer: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    return found
