"""Handing a finished adapter to a running server: new under a name, or as the name's next version."""

from pathlib import Path
from urllib.parse import quote

import httpx

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.names import check_name
from manylora.training.errors import InvalidArgument, TrainingError

TIMEOUT = httpx.Timeout(10.0, read=120.0)
EXISTS = 409
MISSING = "adapter_not_found"
"""The code of an error: there is nothing at a source that may be read."""
NOT_THERE = ".no-adapter-yet"


def can_register(url: str, name: str, directory: Path, admin_key: str | None = None) -> str:
    """Ask the server at ``url`` whether it would take an adapter from us, before hours are spent on one.

    It is asked for one that isn't there, below ``directory``: a server that may read there says just that, and changes
    nothing. Returns a sentence. Raises InvalidArgument for a name that no server takes, TrainingError with the
    server's reason.
    """
    try:
        check_name(name)
    except InvalidAdapter as error:
        raise InvalidArgument(f"--adapter_name: {error}") from None
    where = f"{url.rstrip('/')}/adapters"
    source = {"src": str(directory.resolve() / NOT_THERE)}
    try:
        answer = _send("GET", where, None, admin_key)
        body = answer.json()
        is_new = not answer.is_error and name not in [each["name"] for each in body["data"]]
        if not answer.is_error:
            answer = _ask(where, name, source, admin_key, is_new=is_new)
            body = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"--register {url}: no manylora server answers there ({error}); start it, or leave --register out and"
            " register the adapter by hand"
        ) from None
    if answer.is_error and _part(body, "code") != MISSING:
        raise TrainingError(
            f"--register {url}: {_part(body, 'message') or f'it answered {answer.status_code}'}"
        )
    return f"{url} answers: {name} will be {'a new adapter' if is_new else 'given its next version'} there"


def _ask(
    where: str, name: str, source: dict[str, str], admin_key: str | None, *, is_new: bool
) -> httpx.Response:
    if is_new:
        return _send("POST", where, {"name": name, **source}, admin_key)
    return _send("PUT", f"{where}/{quote(name, safe='/:')}", source, admin_key)


def register(url: str, name: str, directory: Path, admin_key: str | None = None) -> str:
    """Give the adapter in ``directory`` to the server at ``url``. Returns a sentence that says what it serves.

    A name that is taken gets a new version: running requests finish on the old one. Raises TrainingError with the
    server's reason; the adapter on the disk is whole either way.
    """
    body = {"name": name, "src": str(directory.resolve())}
    try:
        answer = _send("POST", f"{url.rstrip('/')}/adapters", body, admin_key)
        if answer.status_code == EXISTS:
            path = f"{url.rstrip('/')}/adapters/{quote(name, safe='/:')}"
            answer = _send("PUT", path, {"src": body["src"]}, admin_key)
        record = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise _refused(url, directory, f"no manylora server answers there: {error}") from None
    if answer.is_error:
        raise _refused(url, directory, _part(record, "message") or f"it answered {answer.status_code}")
    note = record.get("note")
    return f"{url} serves {record['name']}, version {record['version']}{'' if note is None else f'; it was {note}'}"


def _part(body: object, name: str) -> str | None:
    """Return a part of an error's envelope."""
    error = body.get("error") if isinstance(body, dict) else None
    found = error.get(name) if isinstance(error, dict) else None
    return None if found is None else str(found)


def _send(method: str, url: str, body: dict[str, str] | None, admin_key: str | None) -> httpx.Response:
    headers = {} if admin_key is None else {"authorization": f"Bearer {admin_key}"}
    return httpx.request(method, url, json=body, headers=headers, timeout=TIMEOUT)


def _refused(url: str, directory: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"--register {url}: {reason}; the adapter is in {directory}, ready to be registered by hand"
    )
