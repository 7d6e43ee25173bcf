"""What a live display shows of a run, worked out from steps, logs and a clock. Draws nothing."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SMOOTHING = 0.8
"""Weight of what came before, for each logged loss."""
STEPS_REMEMBERED = 100
LOSSES_REMEMBERED = 60
UNINTERESTING = ("_runtime", "_per_second", "_tokens", "_time")
"""Ends of the names of what an evaluation reports beside its metrics."""


@dataclass(slots=True)
class RunMeter:
    """Numbers of a run under way. None: not known yet."""

    now: Callable[[], float] = time.monotonic
    step: int = 0
    total_steps: int = 0
    epoch: float | None = None
    epochs: float | None = None
    loss: float | None = None
    smoothed_loss: float | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOSSES_REMEMBERED))
    learning_rate: float | None = None
    gradient_norm: float | None = None
    rank: int | None = None
    tokens_per_second: float | None = None
    """Of all tokens that went through the model."""
    trained_tokens_per_second: float | None = None
    """Of those that the loss is taken over."""
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluated_at: int | None = None
    evaluating: tuple[int, int] | None = None
    """Batches done and in all, while an evaluation runs."""
    _started: float = 0.0
    _weight: float = 0.0
    _sum: float = 0.0
    _steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=STEPS_REMEMBERED))
    _totals: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)

    def begin(self, step: int, total_steps: int, epochs: float | None) -> None:
        """Start the clock at ``step``: 0, or where a resumed run goes on."""
        self.step, self.total_steps, self.epochs = step, total_steps, epochs
        self._started = self.now()
        self._steps.clear()
        self._steps.append((self._started, step))

    @property
    def elapsed(self) -> float:
        """Seconds since the run, or its resumption, began."""
        return self.now() - self._started

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step at the pace of the latest steps, evaluations between them included."""
        if not self._steps:
            return None
        (first, at), (last, step) = self._steps[0], self._steps[-1]
        if step <= at:
            return None
        return max(0.0, (self.total_steps - self.step) * (last - first) / (step - at) - (self.now() - last))

    def step_ended(self, step: int, epoch: float | None, tokens_seen: int) -> None:
        """A step is done. ``tokens_seen``: the trainer's count so far, 0 where it doesn't count."""
        self.step = step
        self.epoch = epoch if epoch is not None else self.epoch
        self._steps.append((self.now(), step))
        if tokens_seen:
            self._count("num_input_tokens_seen", tokens_seen)

    def logged(self, logs: Mapping[str, Any]) -> None:
        """Take in what the trainer logs: loss, grad_norm, learning_rate, epoch, rank and rates of tokens.

        Rates come as they are (`tokens_per_second`, `trained_tokens_per_second`, `train_tokens_per_second`), or are
        worked out from totals (`num_input_tokens_seen`, `trained_tokens`).
        """
        numbers = {key: float(value) for key, value in logs.items() if isinstance(value, int | float)}
        if "loss" in numbers:
            self._smooth(numbers["loss"])
        self.learning_rate = numbers.get("learning_rate", self.learning_rate)
        self.gradient_norm = numbers.get("grad_norm", self.gradient_norm)
        self.epoch = numbers.get("epoch", self.epoch)
        self.rank = int(numbers["rank"]) if "rank" in numbers else self.rank
        for total in ("num_input_tokens_seen", "trained_tokens"):
            if total in numbers:
                self._count(total, numbers[total])
        rate = numbers.get("tokens_per_second", numbers.get("train_tokens_per_second"))
        self.tokens_per_second = rate if rate else self.tokens_per_second
        trained = numbers.get("trained_tokens_per_second")
        self.trained_tokens_per_second = trained if trained else self.trained_tokens_per_second

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics that an evaluation found, under readable names."""
        self.evaluation = {
            key.removeprefix("eval_").replace("_", " "): float(value)
            for key, value in metrics.items()
            if key.startswith("eval_") and isinstance(value, int | float) and not key.endswith(UNINTERESTING)
        }
        self.evaluated_at, self.evaluating = self.step, None

    def _smooth(self, loss: float) -> None:
        """Exponential mean without the pull of its start at zero, as Adam corrects its moments."""
        self.loss = loss
        self.losses.append(loss)
        if loss != loss or abs(loss) == float("inf"):
            return  # one bad value would stay in the mean for ever
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * loss
        self.smoothed_loss = self._sum / self._weight

    def _count(self, total: str, value: float) -> None:
        """Turn a growing total into a rate over the latest times it was told."""
        told = self._totals.setdefault(total, deque(maxlen=STEPS_REMEMBERED))
        told.append((self.now(), value))
        (first, least), (last, most) = told[0], told[-1]
        if last <= first or most <= least:
            return
        rate = (most - least) / (last - first)
        if total == "trained_tokens":
            self.trained_tokens_per_second = rate
        else:
            self.tokens_per_second = rate
