"""A guarded run: what its guard suspects is looked into, and a run that did go astray goes back, or stops.

Looked into means: the last rows are asked again, of the weights of the last good state and of those now. Harder rows
are as hard for both; weights that fell apart are worse on the same rows. A run goes back only where back is better.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from manylora.training.errors import Diverged
from manylora.training.loop.events import Events
from manylora.training.loop.guard import Guard, Rows, Trouble
from manylora.training.loop.snapshot import Snapshot, slow_down
from manylora.training.loop.verdict import Verdict, compare
from manylora.training.rank.policy import Moment

SNAPSHOT_STEPS = 25
MOST_BACKOFFS = 3
SLOWER = 0.5
_CAUSES: Mapping[str, str] = {
    "exploding": "most often the learning rate is too high or the warm-up too short; try --learning_rate auto, or"
    " --warmup_steps 0.05",
    "runaway": "a learning rate that is too high, or rows unlike the rest; run `manylora data check`, lower the rate or"
    " --max_grad_norm",
}


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """What becomes of trouble."""

    guard: str = "on"
    """off: nobody looks; warn: it is said; on: the run goes back or stops."""
    on_divergence: str = "backoff"
    """backoff, stop, or ignore, which is the same as guard off."""

    @property
    def looks(self) -> bool:
        """Whether anybody looks."""
        return self.guard != "off" and self.on_divergence != "ignore"

    @property
    def acts(self) -> bool:
        """Whether a run is changed or stopped."""
        return self.looks and self.guard != "warn"


class Guarded(Protocol):
    """What a run lends to those who watch it."""

    events: Events

    @property
    def trained(self) -> nn.Module:
        """The model whose trained parameters a way back is kept of."""

    def moment(self) -> Moment:
        """Return where the run is."""

    def recent_losses(self) -> list[float]:
        """Return the losses of the last rows, nats per trained token, of the weights as they are and without dropout.

        All processes' rows, in the same order each time.
        """

    def held_out_losses(self) -> list[float]:
        """Return those of some held-out rows, always the same; none where nothing is held out."""

    def agreed(self, verdict: Verdict) -> Verdict:
        """Return the verdict that all processes go by: losses of the same rows differ in their last bits."""


class Watch:
    """One run's guard, and its way back.

    ``without_adapter`` switches the adapter off. A run is held against that whose parameters are not whole in this
    process, so that no copy can be kept (``keeps_copies``), and one that goes on from a checkpoint, in which there is
    none of what was before it.
    """

    def __init__(
        self,
        run: Guarded,
        settings: GuardSettings,
        without_adapter: Callable[[], AbstractContextManager[None]] | None = None,
        *,
        keeps_copies: bool = True,
    ) -> None:
        self.guard = Guard()
        self.backoffs = 0
        self._run, self._settings, self._without_adapter = run, settings, without_adapter
        self._keeps_copies = keeps_copies
        self._is_of_checkpoint = False
        """Whether the state to come back to is the one that a run went on from: it may have been astray by then."""
        self._snapshot: Snapshot | None = None
        """The state to come back to: its weights were asked, or the steps after it were calm."""
        self._next: Snapshot | None = None
        """The one to follow, once the steps after it were calm: those before it know nothing of the last step."""
        self._looked = 0
        """The step at which the last rows were asked last."""
        self._is_unsure = False
        """Whether the weights were neither worse nor as good when they were asked last: that the level stays where it
        is says nothing then."""
        self._warned: set[str] = set()

    def begin_step(self, total_steps: int) -> None:
        """Keep a way back from the first step on."""
        self.guard.total_steps = total_steps
        if self._snapshot is None and self._settings.looks:
            self._snapshot = self._taken()

    def rank_changed(self) -> None:
        """Drop what was kept: it has other shapes. The next step's beginning keeps anew."""
        self._snapshot = self._next = None

    def look(
        self, rows: Rows, norm: float | None, *, loss: float | None = None, scaled: bool = False
    ) -> None:
        """Look at a step before it is taken; may take the run back. Raises Diverged where it has to stop."""
        if not self._settings.looks:
            return
        trouble = self.guard.observe(rows, norm, loss=loss, scaled=scaled)
        if trouble is None:
            self._look_around()
        elif not trouble.is_fatal:
            self._run.events.say(self._step, trouble.kind, trouble.sentence)
        elif trouble.is_certain:
            self._answer(trouble)
        else:
            self._look_into(trouble)

    def before_saving(self) -> None:
        """Ask the last rows before a checkpoint is written, as a run that goes on from it knows no better state.

        May take the run back; raises Diverged where it has to stop. Where no copies are kept nothing is asked: the run
        that goes on holds itself against the base, as this one does.
        """
        kept = self._snapshot
        if not self._settings.acts or kept is None or kept.step == self._step:
            return
        verdict = self._judged()
        if verdict.is_worse:
            what = f"the checkpoint of step {self._step} would have kept weights that fell apart"
            self._answer(self._proven(Trouble("exploding", what), verdict))
        elif verdict.is_as_good:
            self._snapshot, self._next = self._taken(), None

    def state(self) -> dict[str, object]:
        """Return what a resumed run needs, as JSON."""
        return {"guard": self.guard.state(), "backoffs": self.backoffs, "looked": self._looked}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.guard = Guard.restore(state["guard"])
        self.backoffs, self._looked = state["backoffs"], state["looked"]
        self._is_of_checkpoint = True

    # --- looking

    @property
    def _step(self) -> int:
        return self._run.moment().step

    def _look_around(self) -> None:
        """Now and then, and early on, make sure that all is well, and keep the state as one to come back to."""
        guard = self.guard
        if not guard.can_be_judged or (
            guard.usual is not None and self._step - self._looked < SNAPSHOT_STEPS
        ):
            return
        if guard.is_calm and not self._is_unsure:
            guard.settle(only_lower=True)
            self._all_is_well()
            self._snapshot, self._next = self._next or self._snapshot, self._taken()
            return
        self._look_into(Trouble("exploding", "the loss rose"))

    def _look_into(self, trouble: Trouble) -> None:
        """Settle a suspicion."""
        self._looked = self._step
        verdict = self._judged()
        if verdict.is_worse:
            self._answer(self._proven(trouble, verdict))
            return
        self.guard.settle()
        self._is_unsure = not verdict.is_as_good
        if verdict.is_as_good:
            self._all_is_well()
            self._snapshot = self._taken()

    def _judged(self) -> Verdict:
        """Ask the last rows, and before anything is done some held-out ones."""
        verdict = self._asked()
        if not (verdict.is_worse and self._settings.acts):
            return verdict
        now = self._run.held_out_losses()
        held_out = self._run.agreed(compare(self._before(self._snapshot, self._run.held_out_losses), now))
        return verdict if held_out.is_worse or not held_out.has_rows else held_out

    def _asked(self) -> Verdict:
        """Hold the weights now against the better of the states kept, which becomes the one to come back to."""
        now = self._run.recent_losses()
        verdict = compare(self._before(self._snapshot, self._run.recent_losses), now)
        following, self._next = self._next, None
        if following is not None:
            other = compare(self._before(following, self._run.recent_losses), now)
            if other.before < verdict.before:
                self._snapshot, verdict = following, other
        if self._is_of_checkpoint and self._keeps_copies and self._without_adapter is not None:
            alone = compare(self._before(None, self._run.recent_losses), now)
            if alone.is_worse and alone.before < verdict.before:
                self._snapshot, verdict = None, alone
        return verdict

    def _before(self, state: Snapshot | None, losses: Callable[[], list[float]]) -> list[float]:
        """Return the losses of the weights of ``state``; where none can be kept, of the base alone."""
        if state is not None:
            with state.in_place(self._run.trained):
                return losses()
        if self._without_adapter is not None:
            with self._without_adapter():
                return losses()
        return losses()

    def _proven(self, trouble: Trouble, verdict: Verdict) -> Trouble:
        earlier = "the base alone" if self._snapshot is None else f"the weights of step {self._snapshot.step}"
        return Trouble(
            trouble.kind,
            f"{trouble.sentence}, and the last rows cost {verdict.now:.3g} nats a token where they cost"
            f" {verdict.before:.3g} with {earlier}: {_CAUSES[trouble.kind]}",
        )

    # --- answering

    def _answer(self, trouble: Trouble) -> None:
        if not self._settings.acts:
            self._warn(trouble)
            return
        step, snapshot = self._step, self._snapshot
        if self._settings.on_divergence == "stop" or snapshot is None or self.backoffs == MOST_BACKOFFS:
            after = f" after {self.backoffs} steps back" if self.backoffs else ""
            raise Diverged(f"stopped at step {step + 1}{after}: {trouble.sentence}")
        self.backoffs += 1
        at = self._run.moment()
        snapshot.put_back(self._run.trained, at.optimizer)
        slow_down(at.optimizer, at.scheduler, SLOWER)
        self.guard.forget_recent()
        self._looked, self._is_unsure, self._next = step, False, None
        back = f"{trouble.sentence}. Back to the state of step {snapshot.step}, at half the rate"
        self._run.events.say(step, "backoff", back)

    def _warn(self, trouble: Trouble) -> None:
        """Say it once, until all is well again."""
        if trouble.kind not in self._warned:
            self._warned.add(trouble.kind)
            self._run.events.say(self._step, "warning", f"{trouble.sentence}. The run goes on (--guard warn)")
        if not trouble.is_certain:
            self.guard.settle()

    def _all_is_well(self) -> None:
        self._looked = self._step
        self._is_of_checkpoint = False
        self._warned.clear()

    def _taken(self) -> Snapshot | None:
        """Return the state now, as one to come back to."""
        if not self._keeps_copies:
            return None
        at = self._run.moment()
        return Snapshot.take(at.step, self._run.trained, at.optimizer)
