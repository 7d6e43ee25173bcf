"""Asking a running server: where it is and with which key, and its answer, or one line that says why there is none."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import httpx
import typer

from manylora.failing import fail

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = httpx.Timeout(10.0, read=None, write=None)
"""What a delete waits for is the end of the requests under way."""
_HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")

Url = Annotated[str, typer.Option("--url", envvar="MANYLORA_URL", help="The server.", show_default=True)]
AdminKey = Annotated[
    str | None,
    typer.Option("--admin-key", envvar="MANYLORA_ADMIN_KEY", help="Its --admin-key, if it has one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the server answered.")]


class Refused(Exception):
    """The server's own error."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


@dataclass(frozen=True, slots=True)
class AskedServer:
    """A server that is asked, and the key to ask with."""

    url: str
    admin_key: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether its address is this machine's to itself, so that it may see the same files."""
        return (urlsplit(self.url).hostname or "") in _HERE

    @property
    def headers(self) -> Mapping[str, str]:
        """What every request carries."""
        return {} if self.admin_key is None else {"authorization": f"Bearer {self.admin_key}"}

    def place(self, path: str) -> str:
        """Return the whole address of a path."""
        return self.url.rstrip("/") + path

    def ask(self, method: str, path: str, body: object = None, **more: Any) -> dict[str, Any]:
        """Return the server's answer. Raises Refused with its error; ends the command if no server answers.

        ``more`` is httpx's: params, files, data.
        """
        if body is not None:
            more["json"] = body
        try:
            response = httpx.request(method, self.place(path), headers=self.headers, timeout=TIMEOUT, **more)
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise fail(f"no server answers at {self.url}: {error}") from None
        except UnicodeEncodeError:
            raise fail("--admin-key holds what no key holds: letters beyond ASCII") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise fail(
                f"{self.url} is no manylora server: {path} gave {response.status_code}, not JSON"
            ) from None
        if response.is_error:
            raise _refused(answer, f"{path} gave {response.status_code}")
        if not isinstance(answer, dict):
            raise fail(f"{self.url} is no manylora server: {path} gave no JSON object")
        return answer

    def get(self, method: str, path: str, body: object = None, **more: Any) -> dict[str, Any]:
        """Return the server's answer, or end the command with its error in one line."""
        try:
            return self.ask(method, path, body, **more)
        except Refused as refused:
            raise fail(refused.message) from None


def _refused(answer: object, otherwise: str) -> Refused:
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return Refused(otherwise)
    return Refused(str(error.get("message") or otherwise), error.get("code"))


def path_of(name: str, *more: str) -> str:
    """Return the path of an adapter's route."""
    return "/".join((f"/adapters/{quote(name, safe='/:')}", *more))
