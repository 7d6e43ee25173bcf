"""`ls`, `show` and `versions`: what a server has, where it is, and how it is used."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from manylora.adapters_command import completion
from manylora.adapters_command.server import DEFAULT_URL, AdminKey, AsJson, AskedServer, Url, path_of
from manylora.adapters_command.shown import (
    Shown,
    ago,
    in_words,
    is_mixture,
    is_registration,
    print_json,
    print_table,
    say_note,
    share,
    size,
    spelled,
    stage,
    tier,
)
from manylora.failing import fail

FACTS = (
    *(
        "name",
        "version",
        "versions",
        "canary",
        "registration",
        "id",
        "rank",
        "target_modules",
        "bytes",
        "tier",
        "state",
    ),
    *(
        "reason",
        "note",
        "alora_invocation_tokens",
        "requests",
        "last_used",
        "src",
        "preload",
        "pin",
        "digest",
        "created",
    ),
)
"""What `show` tells of an adapter, in this order."""
Name = Annotated[str, typer.Argument(help="An adapter or a mixture.", autocompletion=completion.names)]


def ls(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show every adapter: rank, size, where its weights are and how it is used; of a mixture its parts and weights."""
    found = AskedServer(url, admin_key).get("GET", "/adapters")
    if as_json:
        print_json(found)
        return
    table = Table(*("name", "version", "rank", "size", "tier", "requests", "last used", "from"))
    for each in found["data"]:
        table.add_row(*map(escape, (each["name"], *_cells(each))))
    print_table(table)
    for each in found["data"]:
        say_note(each)


def _cells(shown: Shown) -> tuple[str, ...]:
    """Return the cells after the name."""
    if is_registration(shown):
        return "", "", size(shown.get("total_bytes")), tier(shown), "", "", str(shown["src"])
    used = f"{shown.get('requests', 0):,}", ago(shown.get("last_used"))
    if is_mixture(shown):
        return str(shown["version"]), "", "", tier(shown), *used, spelled(shown)
    return _version(shown), str(shown["rank"]), size(shown.get("bytes")), tier(shown), *used, shown["src"]


def _version(adapter: Shown) -> str:
    canary = adapter.get("canary")
    version = str(adapter["version"])
    return version if not canary else f"{version}, {canary['version']} for {share(canary)}"


def show(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show one adapter, a version of it (sql@2) or a mixture: its place, its source, its use, what to know of it."""
    server = AskedServer(url, admin_key)
    plain, _, number = name.partition("@")
    found = version_of(server, plain, number) if number else server.get("GET", path_of(name))
    if as_json:
        print_json(found)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts = ("name", "state", "progress", "reason", "src") if is_registration(found) else FACTS
    for fact in facts:
        value = found.get(fact)
        if value is not None and value != "":
            table.add_row(fact.replace("_", " "), escape(_in_words(fact, value)))
    if is_mixture(found):
        table.add_row("mixture", escape(spelled(found)))
    print_table(table)


def _in_words(fact: str, value: Any) -> str:
    match fact:
        case "bytes":
            return size(value)
        case "last_used" | "created":
            return ago(value)
        case "progress":
            return f"{value:.0%}"
        case "registration":
            trial = f", for {share(value)}" if value["share"] is not None else ""
            return f"{stage(value)}, from {value['src']}{trial}"
        case "canary":
            return f"version {value['version']} for {share(value)}"
        case _:
            return in_words(value)


def version_of(server: AskedServer, name: str, number: str) -> dict[str, Any]:
    """Return one version of an adapter, or end the command with the versions that there are."""
    found = server.get("GET", path_of(name, "versions"))["data"]
    for each in found:
        if str(each["version"]) == number:
            return dict(each)
    known = ", ".join(str(each["version"]) for each in found)
    raise fail(f"{name!r} has no version {number!r}; versions: {known}")


def versions(name: Name, url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show the versions of an adapter that are kept, the newest first: which answers, and which is tried beside it."""
    found = AskedServer(url, admin_key).get("GET", path_of(name, "versions"))
    print_json(found) if as_json else show_versions(found)


def show_versions(found: Shown) -> None:
    """Print an adapter's versions as a table."""
    table = Table(*("version", "role", "rank", "size", "tier", "requests", "last used", "made", "from"))
    for each in found["data"]:
        role = f"canary, {share(each)}" if each["role"] == "canary" else each["role"]
        used = f"{each.get('requests', 0):,}", ago(each.get("last_used"))
        cells = (str(each["version"]), role, str(each["rank"]), size(each.get("bytes")), tier(each), *used)
        table.add_row(*map(escape, (*cells, ago(each["created"]), each["src"])))
    print_table(table)
