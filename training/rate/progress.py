"""What a search for a learning rate shows while it runs: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manylora.training.report.panel import clock

SECONDS_BETWEEN_LINES = 10.0


class SearchProgress(TrainerCallback):
    """Counts the steps of all trials together. ``steps`` are the most that there will be."""

    def __init__(
        self,
        steps: int,
        say: Callable[[str], None],
        *,
        live: bool = True,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        console = console or Console(emoji=False, stderr=True)
        self.steps, self.done = steps, 0
        self._say, self._now = say, now
        self._began = self._last_line = now()
        bar = live and console.is_terminal and sys.stderr.isatty()
        columns = (TextColumn("learning rate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True) if bar else None
        self._task = None if self._bar is None else self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        """Start the clock."""
        self._began = self._last_line = self._now()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return self._now() - self._began

    def expected(self, steps: int) -> float | None:
        """Return the seconds that so many further steps should take; None before the first."""
        return self.seconds / self.done * steps if self.done else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Count a step, and write a line if there is no bar and the last one is old enough."""
        self.done += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done)
        elif self._now() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._now()
            left = clock(self.expected(max(0, self.steps - self.done)))
            self._say(
                f"looking for a learning rate: trial step {self.done:,} of at most {self.steps:,}, {left} left"
            )
