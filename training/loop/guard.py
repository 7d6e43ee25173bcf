"""Watches the losses of rows and the gradient's norm, step by step, and says when a run looks astray.

Rows differ: one that the base knows costs 0.1 nats a token, a new one 3, and they may come in any order. So a rise is
held against the spread of the rows' losses, and even then it is a suspicion, which watch.py settles by asking the same
rows of earlier weights. What is no number is no suspicion. It decides and does not act.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

RECENT = 8
"""Steps whose rows are judged together: a bad batch is no trouble."""
SUSPICIOUS, LEAST_RISE = 3.0, 0.1
"""A rise of so many standard errors, and so many nats a token more, is looked into."""
MEMORY = 0.98
"""What the spread keeps of itself from step to step: that of about the last fifty counts."""
NORMS = 50
RUNAWAY, RUNAWAY_STEPS = 50.0, 3
"""A gradient norm this many times its median, this many steps in a row, is looked into: rows differ in that too."""
MOST_SKIPPED = 25
"""Steps in a row that overflow in fp16. A loss scale of 65,536 is below 1 by then, so it isn't the scale's fault."""
FLAT_STEPS, FLAT_SHARE, FLAT_FALL = 50, 0.25, 0.005
"""Flat: not 0.5 % lower after a quarter of the run, and at least 50 steps."""
LEARNT = 0.1
"""A loss (nats per token) that has little left to fall."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows' losses (nats per trained token): how many, their sum and the sum of their squares."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, losses: Sequence[float]) -> "Rows":
        """Sum up the rows' losses."""
        return cls(len(losses), sum(losses), sum(loss * loss for loss in losses))

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def scaled(self, factor: float) -> "Rows":
        """Return the same rows with less weight."""
        return Rows(self.count * factor, self.total * factor, self.squares * factor)

    @property
    def mean(self) -> float:
        """The rows' mean loss; infinite without a row."""
        return self.total / self.count if self.count else math.inf

    @property
    def deviation(self) -> float:
        """The standard deviation from row to row."""
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0)) if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong, or seems so, and what is likely behind it."""

    kind: str
    """nan, exploding, runaway or flat."""
    sentence: str

    @property
    def is_fatal(self) -> bool:
        """Whether going on as before would be of no use."""
        return self.kind != "flat"

    @property
    def is_certain(self) -> bool:
        """Whether there is nothing to look into."""
        return self.kind == "nan"


@dataclass
class Guard:
    """One run's losses and norms so far."""

    total_steps: int = 0
    """Set when training starts, which is when it is known."""
    recent: deque[Rows] = field(default_factory=lambda: deque(maxlen=RECENT))
    period: Rows = Rows()
    """The rows since the level was settled last."""
    usual: Rows | None = None
    """The level that a rise is held against; None until the first is settled."""
    spread: Rows = Rows()
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS))
    first: list[Rows] = field(default_factory=list)
    lowest: float = math.inf
    seen: int = 0
    runaway: int = 0
    skipped: int = 0
    said_flat: bool = False

    def observe(
        self, rows: Rows, norm: float | None, *, loss: float | None = None, scaled: bool = False
    ) -> Trouble | None:
        """Take in one step: its rows' losses, its gradient's norm, and its loss where that has more in it than rows.

        ``scaled``: the loss is scaled (fp16), so that a step that overflows is skipped and its scale lowered, which is
        how a scale is found. A negative norm is what DeepSpeed calls such a step's.
        """
        numbers = (rows.total, 0.0 if norm is None else norm, 0.0 if loss is None else loss)
        if not all(map(math.isfinite, numbers)) or (norm is not None and norm < 0):
            return self._not_a_number(rows.total + (loss or 0.0), scaled)
        self.skipped = 0
        if not rows.count:
            return None
        self.seen += 1
        self.recent.append(rows)
        self.period += rows
        self.spread = self.spread.scaled(MEMORY) + rows
        if len(self.first) < RECENT:
            self.first.append(rows)
        if len(self.recent) == RECENT:
            self.lowest = min(self.lowest, self.level.mean)
        return self._exploding() or self._runaway(norm) or self._flat()

    @property
    def level(self) -> Rows:
        """The rows of the last steps."""
        return sum(self.recent, Rows())

    @property
    def can_be_judged(self) -> bool:
        """Whether there are enough steps to look at."""
        return len(self.recent) == RECENT

    @property
    def is_calm(self) -> bool:
        """Whether the last losses are no higher than what rows differ by."""
        if self.usual is None or not self.can_be_judged:
            return False
        return self.level.mean - self.usual.mean <= self._error(self.usual)

    def settle(self, *, only_lower: bool = False) -> None:
        """Make what was seen the level that a rise is held against: the rows since the last time or, where these are
        higher, the last ones."""
        seen = self.period if only_lower else max(self.period, self.level, key=_mean)
        if seen.count and not (only_lower and self.usual and self.usual.mean <= seen.mean):
            self.usual = seen
        self.period = Rows()
        self.recent.clear()
        self.runaway = 0

    def forget_recent(self) -> None:
        """Start anew, after a step back: what was seen since belongs to weights that are gone."""
        self.recent.clear()
        self.norms.clear()
        self.period = Rows()
        self.seen = self.runaway = self.skipped = 0

    def state(self) -> dict[str, object]:
        """Return what a checkpoint keeps, as JSON."""
        return {
            "recent": [asdict(each) for each in self.recent],
            "period": asdict(self.period),
            "usual": None if self.usual is None else asdict(self.usual),
            "spread": asdict(self.spread),
            "norms": list(self.norms),
            "first": [asdict(each) for each in self.first],
            "lowest": self.lowest if math.isfinite(self.lowest) else None,
            "seen": self.seen,
            "runaway": self.runaway,
            "skipped": self.skipped,
            "said_flat": self.said_flat,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> "Guard":
        """Return the guard that ``state`` was taken of."""
        guard = cls()
        guard.recent.extend(Rows(**each) for each in state["recent"])
        guard.norms.extend(state["norms"])
        guard.period, guard.spread = Rows(**state["period"]), Rows(**state["spread"])
        guard.usual = None if state["usual"] is None else Rows(**state["usual"])
        guard.first = [Rows(**each) for each in state["first"]]
        guard.lowest = math.inf if state["lowest"] is None else state["lowest"]
        for name in ("seen", "runaway", "skipped", "said_flat"):
            setattr(guard, name, state[name])
        return guard

    def _error(self, usual: Rows) -> float:
        """Return the standard error of the last level less ``usual``, by the spread from row to row."""
        return self.spread.deviation * math.sqrt(1 / self.level.count + 1 / usual.count)

    def _exploding(self) -> Trouble | None:
        if self.usual is None or not self.can_be_judged:
            return None
        rise = self.level.mean - self.usual.mean
        if rise <= SUSPICIOUS * self._error(self.usual) + LEAST_RISE:
            return None
        return Trouble("exploding", f"the loss rose from {self.usual.mean:.3g} to {self.level.mean:.3g}")

    def _runaway(self, norm: float | None) -> Trouble | None:
        if norm is None:
            return None
        usual = statistics.median(self.norms) if len(self.norms) >= NORMS // 2 else math.inf
        self.norms.append(norm)
        self.runaway = self.runaway + 1 if norm > RUNAWAY * usual else 0
        if self.runaway < RUNAWAY_STEPS:
            return None
        return Trouble(
            "runaway", f"the gradient's norm went from {usual:.3g} to {norm:.3g} for {RUNAWAY_STEPS} steps"
        )

    def _flat(self) -> Trouble | None:
        """Tell once when nothing is learnt."""
        due = max(FLAT_STEPS, FLAT_SHARE * self.total_steps)
        if self.said_flat or self.seen < due or not self.can_be_judged:
            return None
        self.said_flat = True
        first = sum(self.first, Rows())
        start = first.mean
        risen = self.level.mean - start > SUSPICIOUS * self._error(first)  # other rows, or other trouble
        if start < LEARNT or risen or self.lowest < (1 - FLAT_FALL) * start:
            return None
        return Trouble(
            "flat",
            f"the loss has stayed at {start:.3g} for {self.seen} steps: the learning rate may be too low (try"
            " --learning_rate auto), or equal prompts have different answers (run `manylora data check`)",
        )

    def _not_a_number(self, loss: float, scaled: bool) -> Trouble | None:
        self.skipped += 1
        if scaled and self.skipped < MOST_SKIPPED:
            return None
        what = "gradient's norm" if math.isfinite(loss) else "loss"
        if scaled:
            return Trouble(
                "nan",
                f"the {what} was not a number for {self.skipped} steps in a row, though the loss scale was lowered each"
                " time: fp16 ends at 65,504; try --bf16",
            )
        return Trouble(
            "nan",
            f"the {what} is not a number any more: a learning rate that is too high, or a row that overflows; try"
            " --learning_rate auto, and if it comes back at the same step, look at the rows of that step",
        )


def _mean(rows: Rows) -> float:
    return rows.mean if rows.count else -math.inf
