"""What a bar found: promises, measurements, verdicts, and the table that shows them."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Check:
    """One promise and what was measured."""

    promise: str
    measured: str
    passed: bool


@dataclass(slots=True)
class Report:
    """What one bar found."""

    title: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Figures that promise nothing."""

    def check(self, promise: str, measured: str, passed: bool) -> None:
        """Add a promise."""
        self.checks.append(Check(promise, measured, passed))

    def share(self, promise: str, good: int, total: int, examples: list[str] | None = None) -> None:
        """Add a promise that all of ``total`` cases keep; ``examples`` are some that don't."""
        tail = f"; {' | '.join((examples or [])[:3])}" if good < total and examples else ""
        self.check(promise, f"{good} of {total}{tail}", good == total and total > 0)

    def note(self, text: str) -> None:
        """Add a figure."""
        self.notes.append(text)

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def print(self, console: Console) -> None:
        """Show the table."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.add_column("promised", ratio=3)
        table.add_column("measured", ratio=2)
        table.add_column("")
        for check in self.checks:
            verdict = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
            table.add_row(escape(check.promise), escape(check.measured), verdict)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", highlight=False, markup=False)
