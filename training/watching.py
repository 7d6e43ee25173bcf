"""Who looks on while a run trains: display, recorder, early stopping, and the judge of its answers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from manylora.training import output
from manylora.training.arguments import Arguments
from manylora.training.distributed import is_first_process
from manylora.training.evaluate.best import EarlyStopping
from manylora.training.evaluate.evaluation import EvaluationSettings, GenerationEvaluation
from manylora.training.job import Job
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.report.progress import LiveProgress
from manylora.training.report.record import Event
from manylora.training.report.recorder import RunRecorder


def write_adapter(trainer: LoraTrainer, directory: Path) -> Path:
    """Write the adapter as it is now beside its place in ``directory``. All processes must call it.

    What is in shards is gathered from all of them. Returns where it is. Raises TrainingError where the disk refuses.
    """
    with output.said_of_disk(directory):
        if is_first_process():
            output.open_adapter(directory)
        trainer.accelerator.wait_for_everyone()
        staging = directory / output.STAGING
        trainer.save_model(str(staging))
    return staging


def evaluation_settings(arguments: Arguments) -> EvaluationSettings | None:
    """Return how answers are judged, if they are. Raises InvalidArgument."""
    run = arguments.run
    if run.eval_answers == "none":
        return None
    return EvaluationSettings(
        kind=run.eval_answers,  # type: ignore[arg-type]  # a choice of the parser's
        pattern=run.eval_answers_pattern,
        max_new_tokens=run.eval_answers_max_new_tokens,
        limit=run.eval_answers_limit,
    )


def settle_best_checkpoint(job: Job, say: Callable[[str], None]) -> str | None:
    """Keep the best checkpoint where runs may stop early, and judge it by the answers if there are any.

    Says and returns a sentence where checkpoints were to be written at other times than evaluations.
    """
    arguments = job.arguments
    training, settings = arguments.training, evaluation_settings(arguments)
    if not (arguments.run.early_stopping_patience or settings) or training.eval_strategy == "no":
        return None
    changes: dict[str, Any] = {
        "load_best_model_at_end": True,
        "save_strategy": training.eval_strategy,
        "save_steps": training.eval_steps,
    }
    if "metric_for_best_model" not in arguments.given:
        changes["metric_for_best_model"] = "eval_loss" if settings is None else settings.metric
        changes["greater_is_better"] = settings is not None
    job.changes.update(changes)
    overridden = _overridden(arguments, changes)
    if overridden is not None:
        say(overridden)
    return overridden


def _overridden(arguments: Arguments, changes: Mapping[str, Any]) -> str | None:
    """Say which flags for checkpoints no longer hold."""
    flags = [
        f"--{name} {_plain(getattr(arguments.training, name))}"
        for name in ("save_strategy", "save_steps")
        if name in arguments.given
        and _plain(getattr(arguments.training, name)) != _plain(changes[name])
        and not (name == "save_steps" and _plain(changes["save_strategy"]) == "epoch")
    ]
    if not flags:
        return None
    strategy = _plain(changes["save_strategy"])
    steps = float(changes["save_steps"] or 1)
    every = f"every {steps:g} steps" if steps >= 1 else f"at every {steps:.3g} of the run"
    when = "after every epoch" if strategy == "epoch" else every
    return (
        f"{' '.join(flags)} is not followed: checkpoints are written when the run is evaluated, {when}, so that"
        " the best one can be kept"
    )


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def watch(trainer: LoraTrainer, arguments: Arguments) -> RunRecorder:
    """Put display, recorder and early stopping on the trainer. Returns the recorder."""
    recorder = RunRecorder(lambda: trainer.policy.rank)
    trainer.add_callback(recorder)
    quiet = "disable_tqdm" in arguments.given and arguments.training.disable_tqdm
    display = LiveProgress.install(
        trainer,
        live=arguments.run.live and not quiet,
        rank=lambda: trainer.policy.rank,
        trained_tokens=lambda: trainer.trained_tokens,
    )

    def hear(event: Event) -> None:
        recorder.note(event.kind, event.sentence, event.step)
        if is_first_process():
            display.say(event.sentence)

    trainer.events.listeners.append(hear)
    if arguments.run.early_stopping_patience:
        trainer.add_callback(EarlyStopping(arguments.run.early_stopping_patience))
    return recorder


def answers_now(
    trainer: LoraTrainer, questions: GenerationEvaluation | None, directory: Path
) -> Callable[[], Mapping[str, float]]:
    """Return what scores the adapter as it is now, through the served base. All processes call it, one asks."""

    def score() -> Mapping[str, float]:
        staging = write_adapter(trainer, directory)
        return {} if questions is None else questions.score(staging).metrics

    return score
