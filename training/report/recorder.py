"""Collects a run's history while it runs, across interruptions."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manylora.training.report.record import Event, History, RankChange

NOTES = "manylora_notes"
"""Key of the log entries that carry events and rank changes, so that trainer_state.json brings them back."""


class RunRecorder(TrainerCallback):
    """Keeps what a run logs and what happens in it.

    The log is the trainer's own, which each checkpoint holds and a resumed run goes on with. Events and rank changes
    travel in it as entries of their own: those that happened after a checkpoint are forgotten with the steps that
    are done again, unless they happened in this very process.
    """

    def __init__(self, rank: Callable[[], int] | None = None) -> None:
        """``rank`` says which rank the adapter has now; without it, ranks are noticed where they are logged."""
        self._rank = rank
        self._events: list[Event] = []
        self._ranks: list[RankChange] = []
        self._log: list[Mapping[str, float]] = []
        self._step = 0
        self._state: TrainerState | None = None

    @property
    def history(self) -> History:
        """What has been logged so far."""
        if self._state is not None:
            self._read(self._state)
        return History(
            log=tuple(dict(entry) for entry in self._log),
            ranks=tuple(sorted(self._ranks, key=lambda change: change.step)),
            events=tuple(sorted(self._events, key=lambda event: event.step)),
        )

    def hear(self, event: Event) -> None:
        """Keep an event; a listener for manylora.training.loop.events.Events."""
        self.note(event.kind, event.sentence, event.step)

    def note(self, kind: str, sentence: str, step: int | None = None) -> None:
        """Keep an event; without ``step`` it happened at the step the run is at."""
        event = Event(self._step if step is None else step, kind, sentence)
        if event not in self._events:
            self._events.append(event)
        self._write()

    def rank_changed(self, step: int, rank: int, trained_parameters: int | None = None) -> None:
        """Keep that the adapter has ``rank`` from ``step`` on. The same rank again is no change."""
        before = [change for change in self._ranks if change.step <= step]
        if before and before[-1].rank == rank:
            return
        self._ranks = [change for change in self._ranks if change.step < step]
        self._ranks.append(RankChange(step, rank, trained_parameters))
        self._write()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over what a resumed run's checkpoint tells."""
        self._state = state
        self._step = state.global_step
        for entry in state.log_history:
            for written in entry.get(NOTES, ()):
                self._recall(written)
        self._look_at_rank(state.global_step)
        self._write()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep where the run is, and the rank that the step was taken with."""
        self._state = state
        self._step = state.global_step
        # Ranks change before a step is taken.
        self._look_at_rank(state.global_step - 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Notice a rank that is logged."""
        self._state = state
        if logs and isinstance(logs.get("rank"), int | float):
            self.rank_changed(state.global_step, int(logs["rank"]))

    def _look_at_rank(self, since: int) -> None:
        if self._rank is not None:
            self.rank_changed(since, self._rank())

    def _recall(self, written: Mapping[str, Any]) -> None:
        if "rank" in written:
            change = RankChange(written["step"], written["rank"], written.get("trained_parameters"))
            if all(change.step != known.step for known in self._ranks):
                self._ranks.append(change)
                self._ranks.sort(key=lambda known: known.step)
            return
        event = Event(written["step"], written["kind"], written["sentence"])
        if event not in self._events:
            self._events.append(event)

    def _read(self, state: TrainerState) -> None:
        self._log = [entry for entry in state.log_history if NOTES not in entry]

    def _write(self) -> None:
        """Put the notes into the trainer's log, as one entry at its front, replaced whenever something is added."""
        if self._state is None or not (self._events or self._ranks):
            return
        notes: list[dict[str, Any]] = [
            {"step": event.step, "kind": event.kind, "sentence": event.sentence} for event in self._events
        ]
        for change in self._ranks:
            notes.append(
                {"step": change.step, "rank": change.rank, "trained_parameters": change.trained_parameters}
            )
        others = [entry for entry in self._state.log_history if NOTES not in entry]
        # In place: the trainer and others hold this very list.
        self._state.log_history[:] = [{"step": 0, NOTES: notes}, *others]
