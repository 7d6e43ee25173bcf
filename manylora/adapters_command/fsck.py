"""`fsck`: whether data directories are as they should be, while no server runs on them."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from manylora.adapters.errors import AdapterError, DirectoryInUse
from manylora.adapters.fsck.check import Checked, check, mend
from manylora.adapters.pairing import REGISTRY_FILE, STORE
from manylora.adapters_command.shown import print_json, print_table, say, size
from manylora.failing import fail
from manylora.home import name_in

DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="MANYLORA_DATA_DIR", help="The server's.", show_default=True)
]
Base = Annotated[str | None, typer.Option("--base", help="Name or folder of one base; none: all of them.")]
Repair = Annotated[
    bool, typer.Option("--repair", help="Sweep what a crash left, as the next start of the server would.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")]
DEFAULT_DIR = Path(".manylora")
UNSOUND_STATUS = 1


def fsck(
    data_dir: DataDir = DEFAULT_DIR, base: Base = None, repair: Repair = False, as_json: AsJson = False
) -> None:
    """Check that registry and stored files agree, every file by its hash. Exit status 1 if something is wrong."""
    found = {home: _checked(home, repair) for home in _homes(data_dir, base)}
    sound = all(each.is_sound for each in found.values())
    if as_json:
        print_json({"object": "fsck", "sound": sound, "bases": [_described(*each) for each in found.items()]})
    else:
        for home, checked in found.items():
            _show(home, checked)
    if not sound:
        raise typer.Exit(UNSOUND_STATUS)


def _homes(data_dir: Path, base: str | None) -> list[Path]:
    there = sorted({path.parent for name in (REGISTRY_FILE, STORE) for path in data_dir.glob(f"*/{name}")})
    if not there:
        raise fail(f"{data_dir} holds no adapters: name a server's data directory with --data-dir")
    fitting = [home for home in there if base in (None, home.name, name_in(home))]
    if not fitting:
        known = ", ".join(f"{name_in(home) or '?'} ({home.name})" for home in there)
        raise fail(f"{data_dir} holds no base {base!r}; bases: {known}")
    return fitting


def _checked(home: Path, repair: bool) -> Checked:
    try:
        with _bar(home) as bar:
            task = bar.add_task("hashing", total=None)
            found = check(home, lambda done, of: bar.update(task, completed=done, total=of))
        return mend(home, found) if repair else found
    except DirectoryInUse as error:
        raise fail(f"{home}: {error}: fsck looks at what no server uses") from None
    except AdapterError as error:
        raise fail(f"{home}: {error}") from None
    except OSError as error:
        raise fail(f"{error.filename or home}: {error.strerror}") from None


def _show(home: Path, found: Checked) -> None:
    say(
        f"{name_in(home) or home.name} ({home}): {found.adapters} adapters in {found.versions} versions,"
        f" {found.mixtures} mixtures, {found.stored} sets of files, {size(found.nbytes)}:"
        f" {'all sound' if found.is_sound else 'not sound'}"
    )
    if not found.findings:
        return
    table = Table("", "what", "of", "")
    for each in found.findings:
        level = "repaired" if each.repaired else each.level
        table.add_row(*map(escape, (level, each.kind, each.subject, each.message)))
    print_table(table)
    if any(each.level == "leftover" and not each.repaired for each in found.findings):
        say("what a crash left is swept by the next start of the server, or by --repair")


def _described(home: Path, found: Checked) -> Mapping[str, object]:
    facts = {key: value for key, value in asdict(found).items() if key not in ("directory", "intact")}
    named = {"directory": str(home), "base": name_in(home), "sound": found.is_sound}
    return {**named, **facts, "findings": [asdict(each) for each in found.findings]}


def _bar(home: Path) -> Progress:
    stderr = Console(stderr=True, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
