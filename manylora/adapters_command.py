"""`manylora adapters`: list, add, mix, replace and remove the adapters of a running server, over HTTP as anyone."""

import json
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.mixtures import MixturePart, parse_mixture, part_weight, spell
from manylora.failing import fail

app = typer.Typer(no_args_is_help=True, help="The adapters of a running server.")
# What a delete waits for is the end of the requests under way.
TIMEOUT = httpx.Timeout(10.0, read=None)

Url = Annotated[str, typer.Option("--url", envvar="MANYLORA_URL", help="The server.", show_default=True)]
AdminKey = Annotated[
    str | None,
    typer.Option("--admin-key", envvar="MANYLORA_ADMIN_KEY", help="Its --admin-key, if it has one."),
]
Preload = Annotated[bool, typer.Option("--preload", help="Put it on the device before answering.")]
Pin = Annotated[bool, typer.Option("--pin", help="Keep it on the device.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the server answered.")]
DEFAULT_URL = "http://127.0.0.1:8000"
SHOWN = (
    *("name", "version", "id", "rank", "target_modules", "tier", "state", "reason", "note"),
    *("src", "preload", "pin", "digest"),
)
"""What `show` tells of an adapter, in this order."""


@app.command("list")
def list_adapters(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show every adapter, its version, rank, and where its weights are now; of a mixture its parts and weights."""
    found = call("GET", url, "/adapters", admin_key)
    if as_json:
        _print_json(found)
        return
    table = Table("name", "version", "rank", "tier", "modules", "src")
    for each in found["data"]:
        table.add_row(
            each["name"], str(each["version"]), *(_mixture if _is_mixture(each) else _adapter)(each)
        )
    Console(emoji=False).print(table)
    for each in found["data"]:
        _say_note(each)


@app.command("show")
def show(name: str, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show one adapter or mixture: its version, place and source, and what should be known of it."""
    found = call("GET", url, _path(name), admin_key)
    if as_json:
        _print_json(found)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key in SHOWN:
        value = found.get(key)
        if value is not None and value != "":
            table.add_row(key.replace("_", " "), escape(_in_words(value)))
    if _is_mixture(found):
        table.add_row("mixture", _spelled(found))
    Console(emoji=False, soft_wrap=True, highlight=False).print(table)


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _say_note(shown: dict[str, Any]) -> None:
    """Print what the owner of an adapter should know of it, if anything."""
    if shown.get("note"):
        Console(emoji=False, soft_wrap=True, highlight=False).print(
            f"{escape(shown['name'])} was {escape(shown['note'])}"
        )


def _is_mixture(shown: dict[str, Any]) -> bool:
    return bool(shown["object"] == "mixture")


def _adapter(shown: dict[str, Any]) -> tuple[str, ...]:
    """Return an adapter's cells after its name and version."""
    tier = shown["tier"] if shown["state"] == "available" else _why(shown)
    return str(shown["rank"]), tier, ", ".join(shown["target_modules"]), shown["src"]


def _mixture(shown: dict[str, Any]) -> tuple[str, ...]:
    """Return the same of a mixture, which has no rank, place and modules of its own."""
    return "", "mixture" if shown["state"] == "available" else _why(shown), "", _spelled(shown)


def _why(shown: dict[str, Any]) -> str:
    return f"unavailable: {shown['reason']}"


def _spelled(mixture: dict[str, Any]) -> str:
    parts = [(part["adapter"], part["weight"]) for part in mixture["mixture"]]
    return spell([MixturePart(name, part_weight(name, weight)) for name, weight in parts])


@app.command("add")
def add(
    name: str,
    src: Annotated[str, typer.Argument(help="Directory on the server, below its --adapter-root.")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    preload: Preload = False,
    pin: Pin = False,
) -> None:
    """Serve an adapter under a new name."""
    # Only what was asked for: an adapter that is served already keeps the rest.
    wishes = {key: True for key, asked in (("preload", preload), ("pin", pin)) if asked}
    body = {"name": name, "src": src, **wishes}
    _say(call("POST", url, "/adapters", admin_key, body), "serves")


@app.command("mix")
def mix(
    name: str,
    parts: Annotated[list[str], typer.Argument(help="Adapters with weights, as sql:0.7 pirate:0.3.")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    replace: Annotated[bool, typer.Option("--replace", help="Change a mixture that is there.")] = False,
) -> None:
    """Serve several adapters with weights under one name."""
    # What is a name and what a weight in team:v2 is known there.
    known = {each["name"] for each in call("GET", url, "/adapters", admin_key)["data"]}
    try:
        found = [part for text in parts for part in parse_mixture(text, known.__contains__)]
    except InvalidMixture as error:
        raise fail(str(error)) from None
    mixture = [{"adapter": part.adapter, "weight": part.weight} for part in found]
    if replace:
        made = call("PUT", url, _path(name), admin_key, {"mixture": mixture})
    else:
        made = call("POST", url, "/adapters", admin_key, {"name": name, "mixture": mixture})
    Console(emoji=False).print(
        f"serves {made['name']}, version {made['version']}: {_spelled(made)} (id {made['id']})"
    )


@app.command("replace")
def replace(
    name: str,
    src: Annotated[str, typer.Argument(help="Directory on the server, below its --adapter-root.")],
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Serve other weights under a name: new requests use them, running ones finish on the old ones."""
    _say(call("PUT", url, _path(name), admin_key, {"src": src}), "serves")


@app.command("remove")
def remove(
    name: str,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    abort: Annotated[bool, typer.Option("--abort", help="End running requests instead of waiting.")] = False,
) -> None:
    """Refuse new requests, wait for running ones, give the memory back."""
    gone = call("DELETE", url, f"{_path(name)}?abort={str(abort).lower()}", admin_key)
    if _is_mixture(gone):
        Console(emoji=False).print(f"removed mixture {gone['name']}: {_spelled(gone)}; its adapters stay")
        return
    freed = gone["freed"]
    Console(emoji=False).print(
        f"removed {gone['name']}: {freed['arena_rows']} rank rows, {freed['device_bytes']:,} bytes on the device "
        f"and {freed['host_bytes']:,} on the host are free"
    )


def _path(name: str) -> str:
    return f"/adapters/{quote(name, safe='/:')}"


def call(
    method: str, url: str, path: str, admin_key: str | None, body: dict[str, object] | None = None
) -> dict[str, Any]:
    """Return the server's answer, or end the command with its error in one line."""
    headers = {} if admin_key is None else {"authorization": f"Bearer {admin_key}"}
    try:
        response = httpx.request(method, url.rstrip("/") + path, json=body, headers=headers, timeout=TIMEOUT)
        answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise fail(f"no server answers at {url}: {error}") from None
    except json.JSONDecodeError:
        raise fail(f"{url} is no manylora server: {path} gave {response.status_code}, not JSON") from None
    if response.is_error:
        raise fail(answer.get("error", {}).get("message", f"{path} gave {response.status_code}"))
    found: dict[str, Any] = answer
    return found


def _say(record: dict[str, Any], verb: str) -> None:
    Console(emoji=False).print(
        f"{verb} {record['name']}, version {record['version']}, rank {record['rank']} (id {record['id']})"
    )
    _say_note(record)


def _print_json(value: object) -> None:
    Console(emoji=False).print_json(json.dumps(value))
