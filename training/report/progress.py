"""The live display of a run: a panel on a terminal, a line now and then where there is none."""

import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sized
from typing import Any, ParamSpec, TypeVar, cast

from rich.console import Console
from rich.live import Live
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from manylora.training.report.meter import RunMeter
from manylora.training.report.panel import line, panel

log = logging.getLogger(__name__)
REDRAWS_PER_SECOND = 4
SECONDS_BETWEEN_LINES = 10.0
"""Where nobody watches a terminal."""
Hook = TypeVar("Hook", bound=Callable[..., None])
Q = ParamSpec("Q")
R = TypeVar("R")


def _harmless(hook: Hook) -> Hook:
    """Run the hook in the main process only, and give the display up for good when drawing fails: training goes on."""

    @functools.wraps(hook)
    def guarded(
        self: "LiveProgress",
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **named: Any,
    ) -> None:
        if self.broken or not state.is_world_process_zero:
            return
        try:
            hook(self, args, state, control, **named)
        except Exception as error:
            self.give_up(error)

    return cast(Hook, guarded)


class LiveProgress(TrainerCallback):
    """Shows where a run is, how it does, what it uses and when it will be done. Writes to stderr."""

    def __init__(
        self,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        *,
        live: bool = True,
        rank: Callable[[], int] | None = None,
        trained_tokens: Callable[[], int] | None = None,
    ) -> None:
        """``rank`` and ``trained_tokens`` say what the adapter has now, and what it was trained on so far."""
        self._console = console or Console(
            emoji=False, stderr=True, highlight=False, width=_width(sys.stderr.isatty())
        )
        self._now, self._rank, self._trained_tokens = now, rank, trained_tokens
        self._wants_panel = live and self._console.is_terminal
        self.meter = RunMeter(now)
        self.broken = False
        self._live: Live | None = None
        self._last_line = float("-inf")

    @classmethod
    def install(
        cls,
        trainer: Trainer,
        console: Console | None = None,
        *,
        live: bool = True,
        rank: Callable[[], int] | None = None,
        trained_tokens: Callable[[], int] | None = None,
    ) -> "LiveProgress":
        """Put a display in the place of transformers' progress bar or printer: lines alone unless ``live``."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        progress = cls(console, live=live, rank=rank, trained_tokens=trained_tokens)
        trainer.add_callback(progress)
        # A run that ends with an error tells no callback, and what is said about it would be drawn over.
        trainer.train = progress.closed_after(trainer.train)
        return progress

    def closed_after(self, train: Callable[Q, R]) -> Callable[Q, R]:
        """Return ``train`` with the display taken down when it ends, however it does."""

        @functools.wraps(train)
        def closing(*args: Q.args, **named: Q.kwargs) -> R:
            try:
                return train(*args, **named)
            finally:
                self.close()

        return closing

    @_harmless
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the display."""
        self._close()
        self.meter.begin(state.global_step, state.max_steps, float(state.num_train_epochs or 0) or None)
        if self._wants_panel:
            self._live = Live(
                console=self._console,
                refresh_per_second=REDRAWS_PER_SECOND,
                get_renderable=lambda: panel(self.meter),
            )
            self._live.start()

    @_harmless
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        self.meter.step_ended(state.global_step, state.epoch, state.num_input_tokens_seen)
        if self._rank is not None:
            self.meter.rank = self._rank()
        if self._trained_tokens is not None:
            self.meter.logged({"trained_tokens": self._trained_tokens()})

    @_harmless
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take in what is logged; without a terminal, write a line if the last one is old enough."""
        self.meter.logged(logs or {})
        due = self._now() - self._last_line >= SECONDS_BETWEEN_LINES or state.global_step >= state.max_steps
        if self._live is None and due and "loss" in (logs or {}):
            self._write_line()

    @_harmless
    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Sized | None = None,
        **kwargs: Any,
    ) -> None:
        """Count the batches of an evaluation."""
        done = self.meter.evaluating[0] if self.meter.evaluating else 0
        total = len(eval_dataloader) if isinstance(eval_dataloader, Sized) else 0
        self.meter.evaluating = (done + 1, total)

    @_harmless
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show what the evaluation found."""
        self.meter.evaluated(metrics or {})
        if self._live is None:
            self._write_line()

    @_harmless
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state on the screen."""
        self._close()

    def close(self) -> None:
        """Take the display down. Harmless when it is down."""
        try:
            self._close()
        except Exception as error:
            self.give_up(error)

    def say(self, sentence: str) -> None:
        """Write a sentence above the display, so that it stays."""
        self._console.print(sentence, markup=False, soft_wrap=True)

    def give_up(self, error: Exception) -> None:
        """Show nothing from now on, and say why once."""
        self.broken = True
        live, self._live = self._live, None
        log.warning("the progress display is off: %s", error)
        if live is not None:
            try:
                live.stop()
            except Exception:
                log.debug("the display did not stop in order", exc_info=True)

    def _close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _write_line(self) -> None:
        self._last_line = self._now()
        self._console.print(line(self.meter), markup=False, soft_wrap=True)


def _width(terminal: bool) -> int | None:
    # Where nobody watches there is no width to fold at.
    return None if terminal else 200
