"""Handing a finished adapter to a running server: new under a name, or as the name's next version."""

from pathlib import Path
from urllib.parse import quote

import httpx

from manylora.training.errors import TrainingError

TIMEOUT = httpx.Timeout(10.0, read=120.0)
EXISTS = 409


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
        message = record.get("error", {}).get("message") if isinstance(record, dict) else None
        raise _refused(url, directory, message or f"it answered {answer.status_code}")
    note = record.get("note")
    return f"{url} serves {record['name']}, version {record['version']}{'' if note is None else f'; it was {note}'}"


def _send(method: str, url: str, body: dict[str, str], admin_key: str | None) -> httpx.Response:
    headers = {} if admin_key is None else {"authorization": f"Bearer {admin_key}"}
    return httpx.request(method, url, json=body, headers=headers, timeout=TIMEOUT)


def _refused(url: str, directory: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"--register {url}: {reason}; the adapter is in {directory}, ready to be registered by hand"
    )
