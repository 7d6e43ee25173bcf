"""The live display of `manylora bench serve`, on a terminal only."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from manylora.loadtest.bench.serve import Silent, Watcher
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.summary import percentile
from manylora.loadtest.material.text_table import milliseconds

REFRESHES = 4
"""A second: drawing takes the client's time, which must not be the limit."""
RECENT = 200


class LiveDisplay:
    """A Watcher whose state rich draws."""

    def __init__(self) -> None:
        self.phase("starting", None)

    def phase(self, name: str, total: int | None) -> None:
        """Begin a phase anew."""
        self._name, self._total = name, total
        self._began = time.perf_counter()
        self._done = self._tokens = 0
        self._first: list[float] = []
        self._errors: Counter[str] = Counter()

    def answered(self, answer: Answer) -> None:
        """Count a request."""
        self._done += 1
        if answer.error is not None:
            self._errors[answer.error] += 1
            return
        self._tokens += answer.output_tokens
        if answer.first_token_seconds is not None:
            self._first = [*self._first[-RECENT:], answer.first_token_seconds]

    def __rich__(self) -> Table:
        """Draw."""
        seconds = max(1e-9, time.perf_counter() - self._began)
        table = Table.grid(padding=(0, 2))
        done = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        first = percentile(sorted(self._first), 0.5)
        table.add_row(
            f"[bold]{self._name}[/]",
            f"{seconds:.0f} s",
            f"{done} requests",
            f"{self._tokens / seconds:.0f} tokens/s",
            f"first token {milliseconds(first)} ms",
            f"[red]{sum(self._errors.values())} errors[/]" if self._errors else "no errors",
        )
        return table


@contextmanager
def watching(console: Console) -> Iterator[Watcher]:
    """Yield a Watcher: a live one if ``console`` is a terminal, else a silent one."""
    if not console.is_terminal:
        yield Silent()
        return
    display = LiveDisplay()
    with Live(display, console=console, refresh_per_second=REFRESHES, transient=True):
        yield display
