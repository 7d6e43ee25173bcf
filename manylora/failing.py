"""How a command ends on bad input: one line on stderr and exit status 2."""

import typer
from rich.console import Console
from rich.markup import escape

_stderr = Console(emoji=False, stderr=True, soft_wrap=True, highlight=False)


def fail(message: str) -> typer.Exit:
    """Print one line and return the exit to raise."""
    _stderr.print(f"[bold red]manylora:[/] {escape(message)}")
    return typer.Exit(2)
