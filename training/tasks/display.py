"""What a run of several tasks shows while it runs: a table on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from manylora.training.loop.events import Listener
from manylora.training.report.panel import clock, memory
from manylora.training.report.record import Event
from manylora.training.tasks.member import Member
from manylora.training.tasks.side_by_side import SideBySide

REDRAWS_PER_SECOND = 4
SECONDS_BETWEEN_LINES = 10.0
COLUMNS = ("step", "epoch", "rank", "loss", "rate", "norm", "eval")
"""Of the table, after the task's name; short enough for a terminal of 60 columns, where the names fold."""


class TasksDisplay:
    """Writes to stderr. ``live`` draws a table where a terminal is."""

    def __init__(self, *, live: bool, console: Console | None = None) -> None:
        width = None if sys.stderr.isatty() else 200  # where nobody watches there is no width to fold at
        self._console = console or Console(emoji=False, stderr=True, highlight=False, width=width)
        self._wants_table = live and self._console.is_terminal
        self._live: Live | None = None
        self._run: SideBySide | None = None
        self._values: dict[str, dict[str, float]] = {}
        self._began, self._first_round, self._last_line = time.monotonic(), 0, float("-inf")

    def say(self, sentence: str) -> None:
        """Write a sentence that stays."""
        self._console.print(f"[dim]·[/] {escape(sentence)}", soft_wrap=True)

    def teller(self, name: str) -> Listener:
        """Return what says a task's events under its name."""

        def tell(event: Event) -> None:
            self.say(f"{name}: {event.sentence}")

        return tell

    def begin(self, run: SideBySide) -> None:
        """Start the clock and the table."""
        self._run, self._began, self._first_round = run, time.monotonic(), run.rounds
        if self._wants_table:
            self._live = Live(
                console=self._console, refresh_per_second=REDRAWS_PER_SECOND, get_renderable=self._table
            )
            self._live.start()

    def logged(self, member: Member, values: Mapping[str, float]) -> None:
        """Take in what a task logged."""
        self._values.setdefault(member.name, {}).update(values)

    def round_done(self, run: SideBySide) -> None:
        """Write a line where there is no table and the last one is old enough."""
        last = all(member.finished for member in run.members)
        if self._live is None and (last or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = time.monotonic()
            losses = [f"{member.name} {self._value(member, 'loss')}" for member in run.members]
            self.say("  ".join((self._where(run), *losses)))

    def close(self) -> None:
        """Leave the last state on the screen. Harmless when nothing is shown."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _where(self, run: SideBySide) -> str:
        seconds = time.monotonic() - self._began
        done = run.rounds - self._first_round
        left = clock(seconds / done * (run.total_rounds - run.rounds)) if done else clock(None)
        return f"step {run.rounds}/{run.total_rounds}, {clock(seconds)} gone, {left} left, memory {memory()}"

    def _table(self) -> RenderableType:
        run = self._run
        assert run is not None
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        table.add_column("task", overflow="fold")
        for heading in COLUMNS:
            table.add_column(heading, no_wrap=True)
        for member in run.members:
            table.add_row(
                member.name,
                "stopped" if member.stopped else f"{member.step}/{member.total_steps}",
                f"{member.state.epoch or 0:.2f}",
                str(member.policy.rank),
                *(self._value(member, name) for name in ("loss", "learning_rate", "grad_norm", "eval_loss")),
            )
        bar = ProgressBar(max(1, run.total_rounds), run.rounds)
        return Panel(
            Group(self._where(run), bar, table), title="training", title_align="left", border_style="cyan"
        )

    def _value(self, member: Member, name: str) -> str:
        value = self._values.get(member.name, {}).get(name)
        return "–" if value is None else f"{value:.2e}" if name == "learning_rate" else f"{value:.4g}"
