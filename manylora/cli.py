"""The `manylora` command. Bad input ends in one line on stderr and exit status 2, never in a traceback."""

import sys
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console

from manylora.adapters_command import app as adapters
from manylora.failing import fail
from manylora.merge_command import merge
from manylora.server.config import ServeSettings, load_settings
from manylora.settings_options import command_from_settings, one_line

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__, add_completion=False)


def run_serve(flags: dict[str, Any], config: Path | None) -> None:
    """Serve a 4-bit base model and its adapters over the OpenAI API."""
    try:
        settings = load_settings(flags, config)
    except ValidationError as error:
        raise fail(one_line(error)) from None
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    from manylora.serve import StartError, serve

    try:
        serve(settings)
    except StartError as error:
        raise fail(str(error)) from None


app.command("serve")(command_from_settings(ServeSettings, "base", run_serve))
app.add_typer(adapters, name="adapters")
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

    report(Console())


@app.command("version")
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    Console().print(installed("manylora"))


def _mount_bench() -> None:
    from manylora.loadtest.cli import app as bench

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
    if len(sys.argv) > 1 and sys.argv[1] in ("bench", "--help"):
        _mount_bench()
    if len(sys.argv) > 1 and sys.argv[1] in ("data", "--help"):
        _mount_data()
    if len(sys.argv) > 1 and sys.argv[1] in ("plan", "--help"):
        _mount_plan()
    app()
