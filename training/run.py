"""`manylora train`, from arguments to an adapter that the server takes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from training import output
from training.arguments import Arguments
from training.bases.types import Base
from training.distributed import is_first_process
from training.errors import Diverged, TrainingError
from training.evaluate.evaluation import EvaluationSettings, GenerationEvaluation, Scores
from training.evaluate.generate import Generate
from training.job import Job, total_steps
from training.loop import checkpoints
from training.loop.trainer import LoraTrainer
from training.preparation import prepare
from training.rate.find import apply, find_learning_rate, write_choice
from training.recording import finish_record, start_record
from training.register import register
from training.report.page import write_report
from training.report.progress import LiveProgress
from training.report.record import EvaluationFacts, Event, RunRecord
from training.report.recorder import RunRecorder

OpenGenerate = Callable[[Base], AbstractContextManager[Generate]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the front door brings into a run."""

    say: Callable[[str], None]
    """Shows one sentence to the user."""
    open_generate: OpenGenerate
    """Opens the base as it is served, to answer held-out prompts with."""


def train(arguments: Arguments, around: Surroundings) -> RunRecord:
    """Run all of it. Raises TrainingError; what was trained until then is in the output directory's checkpoints."""
    say = around.say if is_first_process() else _silent
    directory = Path(arguments.training.output_dir)
    if is_first_process():
        output.claim(directory, resume=arguments.run.resume, overwrite=arguments.run.overwrite_output_dir)
    for note in arguments.notes:
        say(note)
    prepared = prepare(arguments, lambda rows: total_steps(arguments.training, rows), say)
    if is_first_process():
        if arguments.run.overwrite_output_dir:
            output.clear(directory)
        output.drop_partial(directory)
    job = Job(arguments, prepared)
    with _questions(job, around) as questions:
        return _run(job, questions, say)


def _silent(_: str) -> None:
    """Say nothing: one process of several speaks."""


@contextmanager
def _questions(job: Job, around: Surroundings) -> Iterator[GenerationEvaluation | None]:
    """Open the served base, if answers are to be judged."""
    run, held_out = job.arguments.run, job.prepared.held_out
    if run.eval_answers == "none" or held_out is None or not is_first_process():
        yield None
        return
    settings = EvaluationSettings(
        kind=run.eval_answers,  # type: ignore[arg-type]  # a choice of the parser's
        pattern=run.eval_answers_pattern,
        max_new_tokens=run.eval_answers_max_new_tokens,
        limit=run.eval_answers_limit,
    )
    count = min(held_out.report.examples, run.eval_answers_limit)
    with around.open_generate(job.prepared.base) as generate:
        yield GenerationEvaluation(settings, [held_out.example(i) for i in range(count)], generate)


def _run(job: Job, questions: GenerationEvaluation | None, say: Callable[[str], None]) -> RunRecord:
    arguments = job.arguments
    directory = Path(arguments.training.output_dir)
    settle_best_checkpoint(job, questions)
    if arguments.learning_rate_auto and not arguments.run.resume:
        choose_rate(job, directory, say)
    record = start_record(arguments, job.prepared, {})
    before = None if questions is None else questions.score(None)
    trainer = job.trainer()
    recorder = watch(trainer, arguments, say)
    if questions is not None:
        trainer.more_metrics = _answers_now(trainer, questions, directory)
    resume = str(checkpoints.last_checkpoint(directory)) if arguments.run.resume else None
    outcome, metrics = "finished", {}
    try:
        metrics = dict(trainer.train(resume_from_checkpoint=resume).metrics)
    except Diverged as error:
        _write(
            finish_record(record, trainer, recorder.history, {}, EvaluationFacts(), None, str(error)),
            directory,
        )
        raise
    except KeyboardInterrupt:
        raise TrainingError(_interrupted(directory)) from None
    if trainer.state.global_step < trainer.state.max_steps:
        outcome = f"stopped early at step {trainer.state.global_step} of {trainer.state.max_steps}"
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    publish(trainer, directory)
    after = None if questions is None or before is None else questions.score(directory)
    record = finish_record(
        record, trainer, recorder.history, metrics, _evaluation(arguments, before, after), None, outcome
    )
    if is_first_process():
        _write(record, directory)
        hand_over(arguments, directory, say)
    return record


def settle_best_checkpoint(job: Job, questions: GenerationEvaluation | None) -> None:
    """Keep the best checkpoint where runs may stop early, and judge it by the answers if there are any."""
    arguments = job.arguments
    training, given = arguments.training, arguments.given
    if not (arguments.run.early_stopping_patience or arguments.run.eval_answers != "none"):
        return
    if training.eval_strategy == "no":
        return
    changes: dict[str, Any] = {
        "load_best_model_at_end": True,
        "save_strategy": training.eval_strategy,
        "save_steps": training.eval_steps,
    }
    if "metric_for_best_model" not in given:
        changes["metric_for_best_model"] = questions.settings.metric if questions is not None else "eval_loss"
        changes["greater_is_better"] = questions is not None
    job.changes.update(changes)


def choose_rate(job: Job, directory: Path, say: Callable[[str], None]) -> None:
    """Find the learning rate, say why, and keep curve and trials beside the adapter."""
    choice = find_learning_rate(job, say)
    apply(job, choice)
    say(choice.reason)
    if is_first_process():
        write_choice(choice, directory)


def watch(trainer: LoraTrainer, arguments: Arguments, say: Callable[[str], None]) -> RunRecorder:
    """Put display, recorder and early stopping on the trainer. Returns the recorder."""
    recorder = RunRecorder()
    trainer.add_callback(recorder)
    display = LiveProgress.install(trainer)

    def hear(event: Event) -> None:
        recorder.note(event.kind, event.sentence, event.step)
        if is_first_process():
            display.say(event.sentence)

    trainer.events.listeners.append(hear)
    if arguments.run.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(arguments.run.early_stopping_patience))
    return recorder


def _answers_now(
    trainer: LoraTrainer, questions: GenerationEvaluation, directory: Path
) -> Callable[[], Mapping[str, float]]:
    """Return what scores the adapter as it is now, through the served base."""

    def score() -> Mapping[str, float]:
        staging = output.open_adapter(directory)
        trainer.policy.save(trainer.model, staging, resumable=False)
        return questions.score(staging).metrics

    return score


def _interrupted(directory: Path) -> str:
    found = checkpoints.checkpoints(directory)
    if not found:
        return "interrupted before the first checkpoint (--save_steps): nothing was kept"
    return f"interrupted; {found[-1]} is whole: go on with the same command and --resume"


def publish(trainer: LoraTrainer, directory: Path) -> None:
    """Write the finished adapter into the output directory, whole."""
    if is_first_process():
        staging = output.open_adapter(directory)
        trainer.save_model(str(staging), _internal_call=True)
        output.publish_adapter(directory)
    trainer.accelerator.wait_for_everyone()


def _evaluation(arguments: Arguments, before: Scores | None, after: Scores | None) -> EvaluationFacts:
    if before is None or after is None:
        return EvaluationFacts()
    return EvaluationFacts(arguments.run.eval_answers, before.metrics, after.metrics, after.samples)


def _write(record: RunRecord, directory: Path) -> None:
    """Write run.json and report.html."""
    if is_first_process():
        record.write(directory / "run.json")
        write_report(record, directory / "report.html")


def hand_over(arguments: Arguments, directory: Path, say: Callable[[str], None]) -> None:
    """Say where the adapter is, and give it to a server if one was named."""
    say(f"The adapter is in {directory}; its report is {directory / 'report.html'}.")
    run = arguments.run
    if run.register is None:
        say(f"Serve it: manylora adapters add {directory.resolve().name} {directory.resolve()}")
        return
    name = run.adapter_name or directory.resolve().name
    say(register(run.register, name, directory, run.admin_key))
