"""Ctrl-C and a scheduler's SIGTERM: the step is finished and a checkpoint written before the run ends."""

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manylora.training.distributed import any_process, world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Remembers the first signal. A second one ends the process at once, unless it is one of several.

    torchrun passes on what its processes have heard from the terminal already; it ends those that take long itself.
    """

    def __init__(self) -> None:
        self.heard = False
        self._before: dict[int, Any] = {}

    def take(self) -> None:
        """Take the signals over, in the main thread, which alone may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def release(self) -> None:
        """Give the signals back. Harmless when they are."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard and world_size() == 1:
            raise KeyboardInterrupt
        self.heard = True


class SaveWhenInterrupted(TrainerCallback):
    """Ends training with a checkpoint at the first signal, in all processes at the same step, whichever heard it."""

    def __init__(self) -> None:
        self.signals = Signals()
        self.interrupted = False
        """Whether training was ended; the same in all processes."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Listen."""
        self.signals.take()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Save and stop, once any process was asked to."""
        self.interrupted = any_process(self.signals.heard, args.device)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back; a run that failed doesn't come to its end."""
        self.signals.release()
