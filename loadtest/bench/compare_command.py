"""`manylora bench compare`: two reports beside each other; exit status 1 where something got worse."""

from pathlib import Path
from typing import Annotated

import typer

from manylora.loadtest.bench.options import fail, stdout


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The report that is compared with.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The report that is judged.")],
    threshold: Annotated[float, typer.Option(min=0.0, help="Percent that a figure may get worse.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare two reports of --json. Exit status 1 if a figure got worse by more than --threshold."""
    from manylora.loadtest.bench.compare import (
        CompareError,
        changes,
        different_settings,
        load_report,
        table,
    )

    share = threshold / 100
    try:
        reports = load_report(before), load_report(after)
        found = changes(*reports, seed)
    except CompareError as error:
        raise fail(error) from None
    except OSError as error:
        raise fail(f"{error.filename}: {error.strerror}") from None
    stdout.print(table(found, share), markup=False)
    for line in different_settings(*reports):
        stdout.print(f"measured differently, {line}", markup=False)
    worse = [each.figure.name for each in found if each.verdict(share) == "worse"]
    if worse:
        stdout.print(f"worse by more than {threshold:g} %: {'; '.join(worse)}", markup=False)
        raise typer.Exit(1)
    stdout.print(f"nothing got worse by more than {threshold:g} %", markup=False)
