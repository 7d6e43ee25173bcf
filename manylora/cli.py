"""The `manylora` command. Bad input ends in one line on stderr and exit status 2, never in a traceback."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from manylora.adapters_command.app import app as adapters
from manylora.cache_command import app as cache
from manylora.failing import fail
from manylora.keys_command import app as keys
from manylora.merge_command import merge
from manylora.server.config import ServeSettings
from manylora.server.config_sources import SettingsError, load_settings
from manylora.settings_options import command_from_settings

# Plain help: rich's takes what stands in brackets for markup, and folds text into the narrowest of three columns.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)


def run_serve(flags: dict[str, Any], config: Path | None) -> None:
    """Serve a 4-bit base model and its adapters over the OpenAI API."""
    try:
        settings = load_settings(flags, config)
    except SettingsError as error:
        raise fail(str(error)) from None
    from manylora.serve import StartError, serve

    try:
        serve(settings)
    except StartError as error:
        raise fail(str(error)) from None


app.command("serve")(command_from_settings(ServeSettings, "base", run_serve))
app.add_typer(adapters, name="adapters")
app.add_typer(cache, name="cache")
app.add_typer(keys, name="keys")
app.command("merge")(merge)


@app.command(
    "train",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Train an adapter: the flags of Qwen's finetune.py, and transformers' own."""
    from manylora.train_command import train as run_train

    run_train(context.args)


@app.command("doctor")
def doctor() -> None:
    """Say what this machine can do and what is missing."""
    from manylora.doctor import report

    report(Console(emoji=False))


@app.command("version")
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("manylora"))


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def manylora(
    asked: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """One 4-bit base model, hundreds of LoRA adapters, one batch, the OpenAI API."""


def _mount_bench() -> None:
    from manylora.loadtest.bench.cli import app as bench

    app.add_typer(
        bench, name="bench", help="Measure a server, the engine, or transformers + peft beside them."
    )


def _mount_data() -> None:
    from manylora.data_command import app as data

    app.add_typer(data, name="data")


def _mount_plan() -> None:
    from manylora.plan_command import plan

    app.command("plan")(plan)


def main() -> None:
    """Run the command line."""
    # Importing the benchmarks takes time that `manylora serve` need not spend.
    word = _first_word()
    for name, mount in (("bench", _mount_bench), ("data", _mount_data), ("plan", _mount_plan)):
        if word in (name, "--help"):
            mount()
    sys.exit(_run())


def _first_word() -> str:
    """Return the word after `manylora`. A shell that asks how a line goes on has the line in a variable."""
    if "_MANYLORA_COMPLETE" not in os.environ:
        return sys.argv[1] if len(sys.argv) > 1 else "--help"
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    words = line.split()
    return words[1] if len(words) > 2 else "--help"


def _run() -> int:
    """Run the command and return its exit status; what is wrong with the words is said in one line."""
    try:
        status = app(prog_name="manylora", standalone_mode=False)
    except typer.Abort:
        return 1
    except Exception as error:
        # typer brings its own copy of click, whose errors have no public name.
        if not hasattr(error, "format_message"):
            raise
        return _refuse(error)
    return status if isinstance(status, int) else 0


def _refuse(error: Any) -> int:
    text = error.format_message()
    if "\n" in text:  # the help that a command without words ends in
        typer.echo(text, err=True)
        return 2
    context = getattr(error, "ctx", None)
    see = "" if context is None else f" (see {context.command_path} --help)"
    return fail(f"{text.rstrip('.')}{see}").exit_code
