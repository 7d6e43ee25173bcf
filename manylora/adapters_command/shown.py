"""What answers look like in a terminal: tables, sizes, times, and mixtures as text. Asks nothing."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from manylora.adapters.mixtures import MixturePart, part_weight, spell

Shown = Mapping[str, Any]
"""An adapter, a mixture or a registration, as the server tells it."""
WIDEST = 10_000
"""Columns where nobody looks at a terminal: what reads a pipe wants each adapter on a line."""
_UNITS = ((86400 * 2, 86400, "days"), (3600 * 2, 3600, "h"), (60, 60, "min"), (1, 1, "s"))


def print_table(table: Table) -> None:
    """Print a table: as wide as the terminal, or as it wants where there is none."""
    width = None if sys.stdout.isatty() else WIDEST
    Console(emoji=False, highlight=False, width=width).print(table)


def say(text: str) -> None:
    """Print a line of words from servers and users: nothing in it is markup."""
    Console(emoji=False, soft_wrap=True, highlight=False).print(escape(text))


def print_json(value: object) -> None:
    """Print JSON, the same whatever the terminal is."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def size(nbytes: int | None) -> str:
    """Return 1.6 MB for 1,592,984."""
    return "" if nbytes is None else decimal(nbytes)


def ago(moment: int | None) -> str:
    """Return how long ago a Unix time was."""
    if moment is None:
        return "never"
    seconds = max(0, int(time.time()) - moment)
    for least, unit, name in _UNITS:
        if seconds >= least:
            return f"{seconds // unit} {name} ago"
    return "now"


def in_words(value: object) -> str:
    """Return a value of an answer as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def is_mixture(shown: Shown) -> bool:
    """Return whether it is a mixture."""
    return bool(shown["object"] == "mixture")


def is_registration(shown: Shown) -> bool:
    """Return whether it is a registration of a name that serves nothing yet."""
    return bool(shown["object"] == "adapter.registration")


def spelled(mixture: Shown) -> str:
    """Return a mixture's parts as text."""
    parts = [(part["adapter"], part["weight"]) for part in mixture["mixture"]]
    return spell([MixturePart(name, part_weight(name, weight)) for name, weight in parts])


def share(canary: Shown) -> str:
    """Return what a canary gets: 10 %."""
    return f"{canary['share'] * 100:g} %"


def tier(shown: Shown) -> str:
    """Return where an adapter's weights are, or why it isn't served."""
    if is_registration(shown):
        return stage(shown)
    if shown["state"] != "available":
        return f"unavailable: {shown['reason']}"
    return "mixture" if is_mixture(shown) else str(shown["tier"])


def stage(registration: Shown) -> str:
    """Return how far a registration is."""
    state, progress = str(registration["state"]), registration.get("progress")
    if state == "failed":
        return f"failed: {registration.get('reason')}"
    return state if progress is None else f"{state} {progress:.0%}"


def say_note(shown: Shown) -> None:
    """Print what the owner of an adapter should know of it, if anything."""
    if shown.get("note"):
        say(f"{shown['name']} was {shown['note']}")


def say_served(record: Shown, verb: str = "serves") -> None:
    """Print which adapter is served now under which name."""
    say(f"{verb} {record['name']}, version {record['version']}, rank {record['rank']} (id {record['id']})")
    say_note(record)
