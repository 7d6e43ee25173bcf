"""`manylora train sweep`: short runs over learning rate, rank and warm-up, the worse ones stopped early."""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from manylora.training.arguments import Arguments
from manylora.training.bases.lora import attach
from manylora.training.errors import Diverged, InvalidArgument
from manylora.training.fields import WITHOUT_WARMUP
from manylora.training.flags import read_flags, words_of_flags
from manylora.training.job import Job, total_steps
from manylora.training.rank.fixed import FixedRank
from manylora.training.rate.find import for_search
from manylora.training.rate.trials import QUIET, without_display

if TYPE_CHECKING:
    from optuna import Trial as OptunaTrial

RUNGS = 4
"""Evaluations of a trial; at each, the worse half of those that came as far is stopped."""


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """What is searched."""

    trials: int = 12
    ranks: tuple[int, ...] = (8, 16, 64)
    warmups: tuple[float, ...] = (0.0, 0.03, 0.1)
    """Shares of the steps."""
    lowest: float = 3e-5
    highest: float = 3e-3
    steps: int = 0
    """Of a trial that isn't stopped; 0: a quarter of the run's, and at least 20."""


@dataclass(frozen=True, slots=True)
class Result:
    """One trial."""

    number: int
    rate: float
    rank: int
    alpha: float
    warmup: float
    steps: int
    loss: float
    """Held-out loss when it ended; infinite if it fell apart."""
    stopped: bool
    """Whether it was stopped early."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials, in their order."""

    results: tuple[Result, ...]

    @property
    def finished(self) -> tuple[Result, ...]:
        """Those that ran to the end and did not fall apart."""
        return tuple(each for each in self.results if not each.stopped and math.isfinite(each.loss))

    @property
    def best(self) -> Result:
        """The best of those that ran to the end. Raises Diverged where none did."""
        if not self.finished:
            raise Diverged(
                "no trial of the sweep ran to its end: try lower --sweep_rates, or more --sweep_trials"
            )
        return min(self.finished, key=lambda each: each.loss)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(message.replace("argument --", "--", 1))


def sweep_parser() -> argparse.ArgumentParser:
    """Return the parser of the sweep's own flags."""
    parser = _Parser(
        prog="manylora train sweep",
        usage="manylora train sweep [FLAGS OF A RUN] [FLAGS OF THE SWEEP]",
        description="Try learning rate, rank and warm-up in short runs, and print the flags of the best. Nothing is"
        " trained for keeps; a table and a plot go into --output_dir.",
        epilog="All other flags are a run's: manylora train --help. --lora_alpha keeps its ratio to --lora_r.",
        add_help=False,
        allow_abbrev=False,
    )
    own = parser.add_argument_group("Sweep")
    add = own.add_argument
    add("--sweep_trials", type=int, default=12, metavar="N", help="Short runs. Default: 12")
    add(
        "--sweep_steps",
        type=int,
        default=0,
        metavar="N",
        help="Steps of a run that isn't stopped early. Default: a quarter of the run's, at least 20",
    )
    numbers = _numbers(int)
    add("--sweep_ranks", type=numbers, default=(8, 16, 64), metavar="N,…", help="Default: 8,16,64")
    shares = _numbers(float)
    add(
        "--sweep_warmups",
        type=shares,
        default=(0.0, 0.03, 0.1),
        metavar="X,…",
        help="Warm-ups, as shares of the steps. Default: 0,0.03,0.1",
    )
    add(
        "--sweep_rates",
        type=shares,
        default=(3e-5, 3e-3),
        metavar="LOWEST,HIGHEST",
        help="Between these learning rates. Default: 3e-5,3e-3",
    )
    return parser


def parse_sweep(argv: Sequence[str]) -> tuple[SweepSettings, list[str]]:
    """Take the sweep's own flags out of ``argv``. Returns them and the rest, which are a run's."""
    parser = sweep_parser()
    found, rest = parser.parse_known_args(words_of_flags(read_flags(argv)))
    rates = found.sweep_rates
    if found.sweep_trials < 1 or min(found.sweep_ranks) < 1 or found.sweep_steps < 0:
        raise InvalidArgument("--sweep_trials, --sweep_ranks and --sweep_steps are whole numbers from 1 up")
    if len(rates) != 2 or not all(0 < rate < math.inf for rate in rates):
        raise InvalidArgument(f"--sweep_rates {_listed(rates)}: expected LOWEST,HIGHEST, two rates above 0")
    if not all(0 <= share < 1 for share in found.sweep_warmups):
        raise InvalidArgument(
            f"--sweep_warmups {_listed(found.sweep_warmups)}: expected shares of the steps, from 0 up to, but not, 1"
        )
    return (
        SweepSettings(
            found.sweep_trials,
            found.sweep_ranks,
            found.sweep_warmups,
            min(rates),
            max(rates),
            found.sweep_steps,
        ),
        rest,
    )


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{each:g}" for each in numbers)


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def numbers(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    return numbers


def check_sweep(arguments: Arguments) -> None:
    """Refuse flags of a run that short runs over ranks and rates would leave out. Raises InvalidArgument."""
    run, lora = arguments.run, arguments.lora
    why = {
        f"--rank_schedule {lora.rank_schedule}": (
            lora.rank_schedule,
            "tries ranks that stay: find the last rank first",
        ),
        "--from_adapter": (arguments.adapter_start, "begins each short run with an adapter of another rank"),
        "--tasks": (run.tasks, "is for one adapter: sweep each task's flags alone"),
        "--resume": (run.resume, "is done in one go"),
        "--register": (run.register, "keeps no adapter that could be registered"),
        "--auto_fit": (run.auto_fit, "runs what it is given: `manylora plan` says what fits"),
        f"--eval_answers {run.eval_answers}": (run.eval_answers != "none", "judges by held-out loss alone"),
        "--early_stopping_patience": (run.early_stopping_patience, "stops short runs by each other"),
        "--load_best_model_at_end": (arguments.training.load_best_model_at_end, "keeps no checkpoints"),
        "--push_to_hub": (arguments.training.push_to_hub, "keeps no adapter that could be pushed"),
    }
    for flag, (given, reason) in why.items():
        if given:
            raise InvalidArgument(f"{flag} doesn't go with a sweep, which {reason}; leave it out")
    if str(arguments.training.lr_scheduler_type.value) in WITHOUT_WARMUP:
        raise InvalidArgument(
            f"--lr_scheduler_type {arguments.training.lr_scheduler_type.value} has no warm-up, which a sweep tries:"
            " constant_with_warmup has one"
        )


def sweep(job: Job, settings: SweepSettings, say: Callable[[str], None]) -> Sweep:
    """Run the trials, each from a fresh adapter. The job's model is used up by it. Raises InvalidArgument."""
    import optuna

    lora = job.prepared.lora
    if lora.starts_from_base:
        raise InvalidArgument(f"a sweep needs many adapters on one base, and {lora.init} changes the base")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    steps = settings.steps or max(
        20, total_steps(job.arguments.training, len(job.prepared.train.dataset)) // 4
    )
    study = optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=job.arguments.training.seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    )
    results: list[Result] = []

    def objective(trial: "OptunaTrial") -> float:
        result = _run_trial(job, settings, steps, trial)
        results.append(result)
        how = " (stopped early)" if result.stopped else ""
        say(
            f"trial {result.number + 1}: rate {result.rate:.1e}, rank {result.rank}, warm-up {result.warmup:g}:"
            f" held-out loss {result.loss:.4g} after {result.steps} steps{how}"
        )
        if result.stopped:
            raise optuna.TrialPruned
        return result.loss if math.isfinite(result.loss) else 1e9

    study.optimize(objective, n_trials=settings.trials)
    return Sweep(tuple(results))


def _run_trial(job: Job, settings: SweepSettings, steps: int, trial: "OptunaTrial") -> Result:
    rate = trial.suggest_float("rate", settings.lowest, settings.highest, log=True)
    rank = trial.suggest_categorical("rank", settings.ranks)
    warmup = trial.suggest_categorical("warmup", settings.warmups)
    fresh = for_search(_with_rank(job, rank))
    changes = {
        **QUIET,
        "max_steps": steps,
        "learning_rate": rate,
        "warmup_steps": warmup,
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // RUNGS),
    }
    trainer = fresh.trainer(FixedRank(rank), changes, on_divergence="stop")
    judge = _Judge(trial)
    without_display(trainer).add_callback(judge)
    try:
        trainer.train()
        loss = (
            judge.loss if judge.step == trainer.state.global_step else float(trainer.evaluate()["eval_loss"])
        )
    except Diverged:
        loss = math.inf
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    return Result(
        trial.number,
        rate,
        rank,
        fresh.prepared.lora.alpha,
        warmup,
        trainer.state.global_step,
        loss,
        judge.stopped,
    )


class _Judge(TrainerCallback):
    """Tells optuna how a trial does, and stops it when optuna says so."""

    def __init__(self, trial: "OptunaTrial") -> None:
        self.trial = trial
        self.rung, self.step = 0, -1
        self.loss = math.inf
        self.stopped = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: object,
    ) -> None:
        """Report the held-out loss."""
        if state.global_step == self.step:
            return
        self.rung += 1
        self.loss, self.step = metrics["eval_loss"], state.global_step
        self.trial.report(self.loss if math.isfinite(self.loss) else 1e9, self.rung)
        if state.global_step < state.max_steps and self.trial.should_prune():
            self.stopped = control.should_training_stop = True


def _with_rank(job: Job, rank: int) -> Job:
    """Return the job with a fresh adapter of ``rank``; alpha keeps its ratio to the rank that was asked for."""
    prepared = job.prepared
    prepared.model.unload()
    # peft leaves its mark on what it has been on, and warns of it.
    prepared.base.model.__dict__.pop("peft_config", None)
    lora = dataclasses.replace(prepared.lora, r=rank, alpha=prepared.lora.alpha * rank / prepared.lora.r)
    set_seed(job.arguments.training.seed)
    fresh = dataclasses.replace(
        prepared, model=attach(prepared.base, lora), lora=lora, policy=FixedRank(rank)
    )
    job.prepared = fresh
    return job


def write_sweep(found: Sweep, directory: Path) -> None:
    """Write sweep.json and sweep.svg."""
    from manylora.training.rate.plot import plot_sweep

    rows = [dataclasses.asdict(each) for each in found.results]
    for row in rows:
        row["loss"] = row["loss"] if math.isfinite(row["loss"]) else None
    best = found.best.number if found.finished else None
    (directory / "sweep.json").write_text(json.dumps({"best": best, "trials": rows}, indent=1))
    (directory / "sweep.svg").write_text(plot_sweep(found), encoding="utf-8")
