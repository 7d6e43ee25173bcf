"""Watches loss and gradient norm, step by step, and says when a run goes where no training comes back from.

It decides and does not act: the trainer backs off or stops.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

RECENT = 5
"""Losses that are averaged: one bad batch is no trouble."""
SETTLED = 10
"""Steps before a rise is judged."""
NORMS = 50
RUNAWAY, RUNAWAY_STEPS = 50.0, 3
"""A gradient norm this many times its median, this many steps in a row."""
FLAT_STEPS, FLAT_SHARE, FLAT_FALL = 50, 0.25, 0.005
"""Flat: not 0.5 % lower after a quarter of the run, and at least 50 steps."""
LEARNT = 0.1
"""A loss (nats per token) that has little left to fall."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong, and what is likely behind it."""

    kind: str
    """nan, exploding, runaway or flat."""
    sentence: str

    @property
    def is_fatal(self) -> bool:
        """Whether going on as before would be of no use."""
        return self.kind != "flat"


@dataclass
class Guard:
    """One run's losses and norms so far."""

    total_steps: int = 0
    """Set when training starts, which is when it is known."""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS))
    first: list[float] = field(default_factory=list)
    best: float = math.inf
    seen: int = 0
    runaway: int = 0
    said_flat: bool = False

    def observe(self, loss: float, norm: float | None) -> Trouble | None:
        """Take in one step. Returns what is wrong, if something is."""
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            return _not_a_number(loss)
        self.seen += 1
        self.losses.append(loss)
        if len(self.first) < RECENT:
            self.first.append(loss)
        trouble = self._exploding() or self._runaway(norm) or self._flat()
        if len(self.losses) == RECENT:
            self.best = min(self.best, self.recent)
        return trouble

    @property
    def recent(self) -> float:
        """The mean of the last losses."""
        return statistics.fmean(self.losses) if self.losses else math.inf

    @property
    def is_calm(self) -> bool:
        """Whether the state now is one to come back to."""
        return len(self.losses) == RECENT and self.recent <= 1.2 * self.best + 0.2

    def forget_recent(self) -> None:
        """Start the averages anew, after a step back."""
        self.losses.clear()
        self.norms.clear()
        self.seen = self.runaway = 0

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "first": self.first,
            "best": self.best if math.isfinite(self.best) else None,
            "seen": self.seen,
            "runaway": self.runaway,
            "said_flat": self.said_flat,
        }

    @classmethod
    def restore(cls, state: dict[str, object]) -> "Guard":
        """Return the guard that ``state`` was taken of."""
        guard = cls()
        for name in ("losses", "norms"):
            values = state[name]
            assert isinstance(values, list)
            getattr(guard, name).extend(values)
        first, best = state["first"], state["best"]
        assert isinstance(first, list)
        guard.first = first
        guard.best = math.inf if best is None else float(str(best))
        guard.seen, guard.runaway = int(str(state["seen"])), int(str(state["runaway"]))
        guard.said_flat = bool(state["said_flat"])
        return guard

    def _exploding(self) -> Trouble | None:
        if self.seen < SETTLED or len(self.losses) < RECENT or self.recent <= 1.5 * self.best + 1.0:
            return None
        return Trouble(
            "exploding",
            f"the loss rose from {self.best:.3g} to {self.recent:.3g}: most often the learning rate is too high or"
            " the warm-up too short; try --learning_rate auto, or --warmup_steps 0.05",
        )

    def _runaway(self, norm: float | None) -> Trouble | None:
        if norm is None:
            return None
        usual = statistics.median(self.norms) if len(self.norms) >= NORMS // 2 else math.inf
        if norm <= RUNAWAY * usual:
            self.norms.append(norm)
            self.runaway = 0
            return None
        self.runaway += 1
        if self.runaway < RUNAWAY_STEPS:
            return None
        return Trouble(
            "runaway",
            f"the gradient's norm went from {usual:.3g} to {norm:.3g} for {RUNAWAY_STEPS} steps: a learning rate that"
            " is too high, or rows unlike the rest; run `manylora data check`, lower the rate or --max_grad_norm",
        )

    def _flat(self) -> Trouble | None:
        """Tell once when nothing is learnt."""
        due = max(FLAT_STEPS, FLAT_SHARE * self.total_steps)
        if self.said_flat or self.seen < due or len(self.losses) < RECENT:
            return None
        self.said_flat = True
        start = statistics.fmean(self.first)
        if start < LEARNT or min(self.best, self.recent) < (1 - FLAT_FALL) * start:
            return None
        return Trouble(
            "flat",
            f"the loss has stayed at {start:.3g} for {self.seen} steps: the learning rate may be too low (try"
            " --learning_rate auto), or equal prompts have different answers (run `manylora data check`)",
        )


def _not_a_number(loss: float) -> Trouble:
    what = "loss" if not math.isfinite(loss) else "gradient's norm"
    return Trouble(
        "nan",
        f"the {what} is not a number any more: a learning rate that is too high, or fp16, whose largest value is"
        " 65,504 (try --bf16); if it comes back at the same step, look at the rows of that step",
    )
