"""Handing a finished adapter to a running server: new under a name, or as the name's next version.

The files are sent, so that it may be on any machine.
"""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from manylora.adapters.errors import AdapterError, InvalidAdapter
from manylora.adapters.names import check_name
from manylora.adapters.sending import Part, opened_parts
from manylora.training.errors import InvalidArgument, TrainingError

# The answer comes when the adapter is served.
TIMEOUT = httpx.Timeout(10.0, read=600.0, write=600.0)
EXISTS = 409
MISSING = "adapter_not_found"
"""The code of an error: a form without files, by one who may send some."""
TOO_OLD = "that server takes no uploads yet: update it"


def can_register(url: str, name: str, admin_key: str | None = None) -> str:
    """Ask the server at ``url`` whether it would take an adapter from us, before hours are spent on one.

    It is sent a form without files: a server that would take some says that they are missing, and changes nothing.
    Returns a sentence. Raises InvalidArgument for a name that no server takes, TrainingError with the server's reason.
    """
    try:
        check_name(name)
    except InvalidAdapter as error:
        raise InvalidArgument(f"--adapter_name: {error}") from None
    try:
        known = _names(url, admin_key)
        if known.get(name) == "mixture":
            raise _Refused(
                f"{name!r} is a mixture there: choose another --adapter_name, or delete the mixture first"
            )
        is_new = name not in known
        answer = _upload(url, name, [], admin_key, is_new=is_new)
        body = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"--register {url}: no manylora server answers there ({error}); start it, or leave --register out and"
            " register the adapter by hand"
        ) from None
    except _Refused as error:
        raise TrainingError(f"--register {url}: {error}") from None
    if _part(body, "code") != MISSING:
        message = _part(body, "message") or f"it answered {answer.status_code}"
        too_old = answer.status_code == 400 and "JSON" in message
        raise TrainingError(f"--register {url}: {TOO_OLD if too_old else message}")
    return f"{url} answers: {name} will be {'a new adapter' if is_new else 'given its next version'} there"


def register(url: str, name: str, directory: Path, admin_key: str | None = None) -> str:
    """Send the adapter in ``directory`` to the server at ``url``. Returns a sentence that says what it serves.

    A name that is taken gets a new version: running requests finish on the old one. Raises TrainingError with the
    server's reason; the adapter on the disk is whole either way.
    """
    try:
        is_new = name not in _names(url, admin_key)
        answer = _send_files(url, name, directory, admin_key, is_new=is_new)
        if answer.status_code == EXISTS and is_new:  # somebody was quicker
            answer = _send_files(url, name, directory, admin_key, is_new=False)
        record = answer.json()
        if answer.is_error:
            raise _Refused(_part(record, "message") or f"it answered {answer.status_code}")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise _refused(url, directory, f"no manylora server answers there: {error}") from None
    except (_Refused, AdapterError) as error:
        raise _refused(url, directory, str(error)) from None
    note = record.get("note")
    return f"{url} serves {record['name']}, version {record['version']}{'' if note is None else f'; it was {note}'}"


class _Refused(Exception):
    """What the server says it won't do, and why."""


def _names(url: str, admin_key: str | None) -> dict[str, str]:
    """Return what the server knows under names that are ours to give: each with what kind of object it is."""
    answer = httpx.get(f"{url.rstrip('/')}/adapters", headers=_headers(admin_key), timeout=TIMEOUT)
    body: Any = answer.json()
    if answer.is_error:
        raise _Refused(_part(body, "message") or f"it answered {answer.status_code}")
    # What is only on its way in isn't there to be replaced.
    return {each["name"]: each["object"] for each in body["data"] if each["object"] != "adapter.registration"}


def _send_files(
    url: str, name: str, directory: Path, admin_key: str | None, *, is_new: bool
) -> httpx.Response:
    with opened_parts(directory) as parts:
        return _upload(url, name, parts, admin_key, is_new=is_new)


def _upload(url: str, name: str, parts: list[Part], admin_key: str | None, *, is_new: bool) -> httpx.Response:
    where = f"{url.rstrip('/')}/adapters"
    # httpx makes a form of what has files alone; (None, text) is a field, and without files anything does for one.
    fields = [("name", (None, name))] if is_new else [("preload", (None, "false"))] * (not parts)
    method, path = ("POST", where) if is_new else ("PUT", f"{where}/{quote(name, safe='/:')}")
    form: Any = [*fields, *parts]
    return httpx.request(method, path, files=form, headers=_headers(admin_key), timeout=TIMEOUT)


def _headers(admin_key: str | None) -> dict[str, str]:
    return {} if admin_key is None else {"authorization": f"Bearer {admin_key}"}


def _part(body: object, name: str) -> str | None:
    """Return a part of an error's envelope."""
    error = body.get("error") if isinstance(body, dict) else None
    found = error.get(name) if isinstance(error, dict) else None
    return None if found is None else str(found)


def _refused(url: str, directory: Path, reason: str) -> TrainingError:
    return TrainingError(
        f"--register {url}: {reason}; the adapter is in {directory}, ready to be registered by hand"
    )
