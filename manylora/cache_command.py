"""`manylora cache`: the prepared weights that servers keep for their next start."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.failing import fail
from manylora.server.config import ServeSettings

if TYPE_CHECKING:
    from manylora.server.model.weight_cache import WeightCache

app = typer.Typer(no_args_is_help=True, help="Prepared weights that are kept for the next start.")
DEFAULT_DIR = ServeSettings.model_fields["data_dir"].default
DAMAGED_STATUS = 1
MIB = 1 << 20
SHOWN = 12
"""Digits of a key, of which a few tell all apart."""

DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="MANYLORA_DATA_DIR", help="The server's.", show_default=True)
]
Keys = Annotated[
    list[str] | None, typer.Argument(metavar="KEY...", help="As `ls` shows them; a beginning is enough.")
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]


@app.command("ls")
def ls(data_dir: DataDir = DEFAULT_DIR) -> None:
    """Show what is kept, the last used first."""
    cache = _open(data_dir)
    table = Table("key", "MiB", "last used", "weights", "base", box=None)
    for entry in cache.entries():
        used = datetime.fromtimestamp(entry.used).astimezone().strftime("%Y-%m-%d %H:%M")
        try:
            about = cache.about(entry.key)
        except (OSError, ValueError) as error:
            about = {"base": f"broken: {error}"}
        said = (escape(str(about.get(name, ""))) for name in ("weights", "base"))
        table.add_row(entry.key[:SHOWN], f"{entry.nbytes / MIB:,.0f}", used, *said)
    Console(emoji=False, soft_wrap=True, highlight=False).print(table)


@app.command("rm")
def rm(keys: Keys = None, every: All = False, data_dir: DataDir = DEFAULT_DIR) -> None:
    """Delete kept weights. A server that has them mapped goes on; the next start prepares them anew."""
    cache = _open(data_dir)
    for key in _chosen(cache, keys or [], every):
        if cache.remove(key):
            typer.echo(f"deleted {key}")


@app.command("check")
def check(keys: Keys = None, every: All = False, data_dir: DataDir = DEFAULT_DIR) -> None:
    """Read kept weights through, which a start doesn't; exit status 1 if some aren't what was written."""
    cache, sound = _open(data_dir), True
    for key in _chosen(cache, keys or [], every):
        try:
            cache.check(key)
            typer.echo(f"{key} is sound")
        except (OSError, ValueError) as error:
            sound = False
            typer.echo(f"{key} is damaged: {error}; delete it with `manylora cache rm`", err=True)
    if not sound:
        raise typer.Exit(DAMAGED_STATUS)


def _open(data_dir: Path) -> "WeightCache":
    # torch takes a second, which --help need not.
    from manylora.server.model.weight_cache import WEIGHTS, WeightCache

    return WeightCache(data_dir / WEIGHTS, 0)


def _chosen(cache: "WeightCache", keys: list[str], every: bool) -> list[str]:
    """Return the keys that were meant."""
    held = [entry.key for entry in cache.entries()]
    if every:
        return held
    if not keys:
        raise fail("name a key (`manylora cache ls` shows them), or give --all")
    found = []
    for key in keys:
        fitting = [each for each in held if each.startswith(key)]
        if len(fitting) != 1:
            told = "is the beginning of several keys" if fitting else "no weights are kept under it"
            raise fail(f"{key}: {told}; `manylora cache ls` shows them")
        found += fitting
    return found
