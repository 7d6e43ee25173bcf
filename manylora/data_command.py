"""The `manylora data` commands: what is wrong with a data set, said before a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.extras import need_training
from manylora.failing import fail
from manylora.training.check.check import CheckSettings, check_data
from manylora.training.check.fix import fix
from manylora.training.check.kinds import flags_named
from manylora.training.check.lengths import load_tokenizer
from manylora.training.check.page import write_page
from manylora.training.check.report import SHOWN, CheckReport
from manylora.training.data.columns import parse_columns
from manylora.training.errors import InvalidArgument, TrainingError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Look after training data.")

_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}
FINDINGS_STATUS = 1
"""The exit status of --strict when there are errors or warnings; bad input is 2, as everywhere."""


@app.callback()
def data() -> None:
    """Look after training data."""


Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Training data.")]
Evaluation = Annotated[
    list[str] | None,
    typer.Option("--eval", help="Evaluation data that must not be in FILE; may be given again."),
]
Base = Annotated[Path | None, typer.Option(help="A base's directory, to count tokens by its tokenizer.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a row that training reads; more is overlong.")
]
Ignore = Annotated[
    list[str] | None, typer.Option(help="A kind of finding to leave out, such as near-duplicate.")
]
Strict = Annotated[bool, typer.Option("--strict", help="End with status 1 on errors or warnings.")]
Fixed = Annotated[
    Path | None,
    typer.Option(
        "--fix",
        metavar="OUT",
        help="Write a cleaned file; of several FILEs, a directory. Rows with errors are left out; with warnings,"
        " those that --remove names.",
    ),
]
Remove = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help="A kind of finding whose rows --fix leaves out. May be given again."),
]
Format = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="The files' format; without it, told by the rows."),
]
ColumnNames = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="Fields that the files name otherwise: prompt=ticket,completion=label.",
    ),
]
Page = Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Write the report as a page.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON, with every row found.")]


@app.command("check")
def check(
    files: Files,
    evaluation: Evaluation = None,
    base: Base = None,
    max_length: MaxLength = None,
    ignore: Ignore = None,
    strict: Strict = False,
    fixed: Fixed = None,
    remove: Remove = None,
    format: Format = None,
    columns: ColumnNames = None,
    page: Page = None,
    as_json: AsJson = False,
) -> None:
    """Find broken, empty, overlong, looping, cut-off, doubled, contradictory or leaked rows before a run does."""
    need_training()
    removed = tuple(remove or ())
    try:
        _refuse_outputs(fixed, removed, page)
        tokenizer = load_tokenizer(base) if base is not None else None
        renamed = parse_columns(columns) if columns is not None else None
        paths, held_out = tuple(files), tuple(evaluation or ())
        settings = CheckSettings(paths, held_out, tokenizer, max_length, tuple(ignore or ()), format, renamed)
        report = check_data(settings)
        if page is not None:
            write_page(report, page)
        done = fix(report, fixed, removed).sentences() if fixed is not None else []
    except (TrainingError, OSError) as error:
        raise fail(str(error)) from None
    if as_json:
        typer.echo(json.dumps(report.as_json() | ({"fix": done} if done else {}), ensure_ascii=False))
    else:
        show(report, done, Console(emoji=False))
    if strict and not report.ok:
        raise typer.Exit(FINDINGS_STATUS)


def _refuse_outputs(fixed: Path | None, removed: Sequence[str], page: Path | None) -> None:
    """Say what can't be written before anybody waits for the check. Raises InvalidArgument."""
    if fixed is not None and fixed.exists():
        raise InvalidArgument(f"{fixed}: is there already; a cleaned file never replaces another")
    if page is not None and page.exists() and page.suffix not in (".html", ".htm"):
        raise InvalidArgument(f"{page}: is there already and is no page; --html replaces only .html files")
    if removed and fixed is None:
        raise InvalidArgument("--remove says what --fix OUT leaves out: name the file to write")
    flags_named(removed)


def show(report: CheckReport, done: Sequence[str], console: Console) -> None:
    """Print a report: a table of findings, the first rows of each, and what was done about them."""
    console.print(escape(report.sentences()[0]), highlight=False)
    if report.findings:
        console.print(_table(report))
    for finding in report.findings:
        title = f"[{_COLOURS[finding.severity]}]{escape(finding.kind.title)}[/]{finding.shown(SHOWN)}"
        console.print(f"\n{title}", highlight=False)
        for place in finding.examples[:SHOWN]:
            like = f" [dim]see {escape(str(place.like))}[/]" if place.like else ""
            console.print(f"  {escape(str(place))}{like}", highlight=False)
            console.print(
                f"    [dim]{escape(repr(place.excerpt)[1:-1])}[/]", highlight=False, overflow="fold"
            )
    for title, mix in (("tokens from", report.lengths), ("languages", report.languages)):
        most = sorted(zip(mix.counts, mix.names, strict=True), reverse=True)[:6]
        shares = ", ".join(f"{name} {count / max(sum(mix.counts), 1):.1%}" for count, name in most if count)
        console.print(f"\n{title}: {escape(shares)}", highlight=False, end="")
    console.print()
    for sentence in done:
        console.print(escape(sentence), highlight=False)


def _table(report: CheckReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "Finding", "Rows", "Share", "Rows that …"):
        table.add_column(name, justify="right" if name in ("Rows", "Share") else "left")
    for finding in report.findings:
        colour = _COLOURS[finding.severity]
        table.add_row(
            f"[{colour}]{finding.severity}[/]",
            escape(finding.kind.title),
            f"{finding.count:,}",
            f"{finding.share:.2%}",
            escape(finding.kind.says),
        )
    return table
