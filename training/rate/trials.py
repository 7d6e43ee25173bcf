"""Short runs of the job itself: at rising rates for the range test, at one rate for a trial."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from manylora.training.errors import Diverged
from manylora.training.job import Job
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.rank.fixed import FixedRank
from manylora.training.rate.curve import Curve, has_blown_up

LOWEST, HIGHEST = 1e-6, 1e-1
FINALISTS = 3
PROBE_ROWS, PROBE_STEPS = 16, 2
"""Held-out rows that make a point of the range test's curve, and steps from one point to the next."""
WARMUP = 5
"""Steps at the lowest rate but two decades: B starts at zero, and A's gradient with it."""
QUIET = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": [],
    "logging_strategy": "no",
    "logging_first_step": False,
    "disable_tqdm": True,
    "log_level": "error",
    "push_to_hub": False,
}
"""Training arguments of runs that leave nothing behind."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A short run at one rate."""

    rate: float
    steps: int
    loss: float
    """Held-out loss, nats per trained token; infinite if the run fell apart."""


class _Rising(TrainerCallback):
    """Sets a rate before every step, and notes what some held-out rows cost after it.

    The same rows each time: what a step's own cost says more about them than about the rate.
    """

    def __init__(self, trainer: LoraTrainer, rates: list[float]) -> None:
        self.trainer, self.rates = trainer, rates
        self.points: list[float] = []
        """The rates after which the rows were asked."""
        self.losses: list[float] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Set the rate; keep the ratios between groups (LoRA+)."""
        rate = self.rates[min(state.global_step, len(self.rates) - 1)]
        for group in self.trainer.moment().optimizer.param_groups:
            group["lr"] = rate * group.get("initial_lr", args.learning_rate) / args.learning_rate

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Ask the rows now and then, and end the test when the loss has blown up."""
        risen = state.global_step - WARMUP
        if risen < 1 or risen % PROBE_STEPS:
            return
        self.points.append(self.rates[state.global_step - 1])
        self.losses.append(statistics.fmean(self.trainer.held_out_losses(PROBE_ROWS) or [math.nan]))
        if has_blown_up(self.losses):
            control.should_training_stop = True


def range_test(job: Job, steps: int) -> Curve:
    """Raise the rate from step to step, on the real data at the real batch size. The model is left trained.

    The curve is that of held-out rows, the same at each point. Raises Diverged where it has no point.
    """
    rising = [LOWEST * (HIGHEST / LOWEST) ** (step / max(steps - 1, 1)) for step in range(steps)]
    rates = [LOWEST * 100] * WARMUP + rising
    changes = {**QUIET, "max_steps": len(rates), "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = job.trainer(_fixed(job), changes, guard="off")
    callback = _Rising(trainer, rates)
    trainer.add_callback(callback)
    without_display(trainer).train()
    _unwrap(trainer)
    finite = [loss for loss in callback.losses if math.isfinite(loss)]
    if not finite:
        raise Diverged(
            "--learning_rate auto: the held-out loss is not a number at any rate; run `manylora data check`, and try"
            " --bf16 in place of --fp16"
        )
    return Curve(tuple(callback.points[: len(finite)]), tuple(finite))


def trial(job: Job, rate: float, steps: int) -> Trial:
    """Train for ``steps`` at ``rate``, with the run's own schedule drawn together to that length, and evaluate."""
    changes = {**QUIET, "max_steps": steps, "learning_rate": rate}
    trainer = job.trainer(_fixed(job), changes, on_divergence="stop", guard="on")
    trainer.more_metrics = None
    try:
        without_display(trainer).train()
        loss = float(trainer.evaluate()["eval_loss"])
    except Diverged:
        loss = math.inf
    _unwrap(trainer)
    return Trial(rate, steps, loss if math.isfinite(loss) else math.inf)


def without_display(trainer: LoraTrainer) -> LoraTrainer:
    """Take transformers' progress bar and printer off a trainer, and return it."""
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    return trainer


def _unwrap(trainer: LoraTrainer) -> None:
    """Take accelerate's mixed precision off the model's forward, so that trials don't put layer on layer."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def halving(candidates: tuple[float, ...], steps: int, run: Callable[[float, int], Trial]) -> Iterator[Trial]:
    """Yield trials: all candidates, then the better half with twice the steps, until three or fewer have met."""
    field = list(candidates)
    while True:
        found = [run(rate, steps) for rate in field]
        yield from found
        if len(field) <= FINALISTS:
            return
        ranked = sorted(found, key=lambda each: each.loss)
        field = [each.rate for each in ranked[: max(FINALISTS, math.ceil(len(field) / 2))]]
        steps *= 2


def _fixed(job: Job) -> FixedRank:
    """Return the policy of a trial: the rank that the run begins with, unchanged."""
    return FixedRank(job.prepared.policy.initial_rank)
