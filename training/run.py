"""`manylora train`, from arguments to an adapter that the server takes."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.manifest import AdapterManifest, write_manifest
from manylora.training import output
from manylora.training.arguments import Arguments
from manylora.training.bases.servable import serve_command
from manylora.training.bases.types import Base
from manylora.training.continuing import Kept, compare, facts_of, keep, settled_again
from manylora.training.distributed import is_first_process
from manylora.training.errors import Diverged, DoesNotFit, InvalidArgument, TrainingError
from manylora.training.evaluate.evaluation import GenerationEvaluation, Scores
from manylora.training.evaluate.generate import Generate
from manylora.training.job import Job, total_steps
from manylora.training.loop import checkpoints
from manylora.training.loop.against_base import worse_than_base
from manylora.training.loop.interrupt import SaveWhenInterrupted
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.manifest import manifest_of
from manylora.training.memory.job import fit_job, plan_job
from manylora.training.memory.meter import PeakMeter
from manylora.training.memory.native_caches import keep_native_caches_small
from manylora.training.preparation import Prepared, Say, prepare
from manylora.training.rate.find import Choice, apply, find_learning_rate, write_choice
from manylora.training.recording import finish_record, published_best, start_record
from manylora.training.register import can_register, register
from manylora.training.report.page import write_report
from manylora.training.report.record import EvaluationFacts, RunRecord, SearchFacts
from manylora.training.report.trackers import check_report_to
from manylora.training.tasks.tasks import run_tasks
from manylora.training.watching import (
    answers_now,
    evaluation_settings,
    settle_best_checkpoint,
    watch,
    write_adapter,
)

OpenGenerate = Callable[[Base], AbstractContextManager[Generate]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the front door brings into a run."""

    say: Say
    """Shows one sentence to the user."""
    open_generate: OpenGenerate
    """Opens the base as it is served, to answer held-out prompts with."""


def train(arguments: Arguments, around: Surroundings) -> None:
    """Run all of it, for one adapter or for one of each task.

    Raises TrainingError; what was trained until then is in the output directory's checkpoints.
    """
    keep_native_caches_small(tasks=arguments.run.tasks is not None)
    check_report_to(arguments.training.report_to)
    if arguments.run.tasks is not None:
        run_tasks(arguments)
        return
    directory = Path(arguments.training.output_dir)
    with output.alone(directory) if is_first_process() else nullcontext():
        _train_one(arguments, directory, around)


def _train_one(arguments: Arguments, directory: Path, around: Surroundings) -> None:
    say = around.say if is_first_process() else _silent
    point = resume_point(arguments)
    if is_first_process():
        output.claim(
            directory,
            resume=point is not None,
            overwrite=arguments.run.overwrite_output_dir,
            checkpoint=point,
        )
    for note in arguments.notes:
        say(note)
    if arguments.run.register is not None and is_first_process():
        say(can_register(arguments.run.register, adapter_name(arguments), arguments.run.admin_key))
    job = _job(arguments, point, say)
    if is_first_process():
        output.open_output(directory, overwrite=arguments.run.overwrite_output_dir)
    if arguments.run.auto_fit and point is None:
        fit_job(job, lambda changed: _prepare(changed, say), say)
    with _questions(job, around) as questions:
        _run(job, questions, say)


def resume_point(arguments: Arguments) -> Path | None:
    """Return the checkpoint to go on from: the one that was named, or the last. Raises InvalidArgument."""
    if not arguments.run.resume:
        return None
    named = arguments.training.resume_from_checkpoint
    return Path(named) if named else checkpoints.last_checkpoint(Path(arguments.training.output_dir))


def _job(arguments: Arguments, point: Path | None, say: Say) -> Job:
    """Prepare the run, after holding it against the one that it goes on with."""
    if point is None:
        return Job(arguments, _prepare(arguments, say))
    kept = Kept.of(checkpoints.read_state(point))
    arguments, changes = settled_again(arguments, kept)
    compare(point, kept, facts_of(arguments, changes))
    prepared = _prepare(arguments, say)
    compare(point, kept, {"base": prepared.base.fingerprint})
    return Job(arguments, prepared, changes)


def _prepare(arguments: Arguments, say: Say) -> Prepared:
    return prepare(arguments, lambda rows: total_steps(arguments.training, rows), say)


def _silent(_: str) -> None:
    """Say nothing: one process of several speaks."""


@contextmanager
def _questions(job: Job, around: Surroundings) -> Iterator[GenerationEvaluation | None]:
    """Open the served base, if answers are to be judged. Raises InvalidArgument if it won't take the adapter."""
    settings, held_out = evaluation_settings(job.arguments), job.prepared.held_out
    if settings is None or held_out is None:
        yield None
        return
    if not job.prepared.servable.yes:
        raise InvalidArgument(
            f"--eval_answers asks the served base, which does not take this adapter: {job.prepared.servable.because}"
        )
    if not is_first_process():
        yield None
        return
    count = min(held_out.report.examples, settings.limit)
    with around.open_generate(job.prepared.base) as generate:
        yield GenerationEvaluation(settings, [held_out.example(i) for i in range(count)], generate)


def _run(job: Job, questions: GenerationEvaluation | None, say: Say) -> None:
    arguments = job.arguments
    directory = Path(arguments.training.output_dir)
    overridden = settle_best_checkpoint(job, say)
    wants_rate = arguments.learning_rate_auto and not arguments.run.resume
    choice = choose_rate(job, directory, say) if wants_rate else None
    record = start_record(job.arguments, job.prepared, plan_job(job).parts, job.changes)
    search = _search(choice, resume_point(arguments))
    record = dataclasses.replace(record, search=search)
    before = None if questions is None else questions.score(None)
    trainer = job.trainer()
    trainer.run_state = keep(arguments, job.changes, job.prepared.base.fingerprint, search).state()
    if evaluation_settings(arguments) is not None:
        trainer.more_metrics = answers_now(trainer, questions, directory)
    recorder = watch(trainer, arguments)
    for sentence in (overridden, None if choice is None else choice.reason):
        if sentence is not None:
            recorder.note("note", sentence, 0)
    with PeakMeter(trainer.args.device) as meter:
        try:
            metrics = _train(trainer, resume_point(arguments), directory, say)
        except Diverged as error:
            none, peak = EvaluationFacts(), meter.peak_gib
            record = finish_record(record, trainer, recorder.history, {}, none, peak, str(error))
            _write(record, directory, say)
            raise
    publish(trainer, directory, manifest_of(arguments, job.prepared.train, say))
    metrics.update(_held_out(trainer))
    worse = _worse(trainer)
    after = None if questions is None else questions.score(directory)
    peak = meter.peak_gib
    if is_first_process():
        found = _evaluation(arguments, before, after)
        outcome = _outcome(trainer, worse)
        record = finish_record(record, trainer, recorder.history, metrics, found, peak, outcome)
        _write(record, directory, say)
        hand_over(job, trainer, directory, say)
        if worse is not None:
            say(f"The adapter is {worse}.")


def _search(choice: Choice | None, point: Path | None) -> SearchFacts:
    """Return what is known of a search for the rate: this run's, or that of the run that it goes on with."""
    if choice is not None:
        return choice.facts()
    return SearchFacts() if point is None else Kept.of(checkpoints.read_state(point)).search


def _train(trainer: LoraTrainer, point: Path | None, directory: Path, say: Say) -> dict[str, float]:
    """Train to the end, from ``point`` if the run is resumed. Raises TrainingError when interrupted."""
    resume = None if point is None else str(point)
    signals = SaveWhenInterrupted()
    trainer.add_callback(signals)
    try:
        metrics: dict[str, float] = dict(trainer.train(resume_from_checkpoint=resume).metrics)
    except KeyboardInterrupt:
        raise TrainingError(_interrupted(directory)) from None
    finally:
        signals.release()
    if signals.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise TrainingError(_interrupted(directory))
    if trainer.state.global_step > trainer.state.max_steps:
        say(
            f"{resume} is at step {trainer.state.global_step}, and the run was to end at {trainer.state.max_steps}: no"
            " step was taken"
        )
    return metrics


def _held_out(trainer: LoraTrainer) -> dict[str, float]:
    """Return what the held-out rows say; nothing where they don't fit into memory, which is no reason to end there."""
    if trainer.eval_dataset is None:
        return {}
    try:
        return dict(trainer.evaluate())
    except DoesNotFit as error:
        if trainer.args.world_size > 1:
            raise
        trainer.events.say(
            trainer.state.global_step, "split", f"{error}; the adapter is published all the same"
        )
        return {}


def _worse(trainer: LoraTrainer) -> str | None:
    """Return how the run did harm, where it did, and say it."""
    worse = worse_than_base(trainer, trainer.without_adapter)
    if worse is not None:
        trainer.events.say(trainer.state.global_step, "worse", f"The adapter is {worse}")
    return worse


def _outcome(trainer: LoraTrainer, worse: str | None) -> str:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    ended = "finished" if step >= steps else f"stopped early at step {step} of {steps}"
    best = published_best(trainer)
    published = "" if best is None else f"; published is {best.sentence}"
    return f"{ended}{published}" + ("" if worse is None else f"; {worse}")


def choose_rate(job: Job, directory: Path, say: Say) -> Choice:
    """Find the learning rate, say why it is that one, and keep curve and trials beside the adapter."""
    choice = find_learning_rate(job, say)
    apply(job, choice)
    say(choice.reason)
    if is_first_process():
        write_choice(choice, directory)
    return choice


def _interrupted(directory: Path) -> str:
    found = checkpoints.checkpoints(directory)
    if not found:
        return "interrupted before the first checkpoint (--save_steps): nothing was kept"
    return f"interrupted; {found[-1]} is whole: go on with the same command and --resume"


def publish(trainer: LoraTrainer, directory: Path, manifest: AdapterManifest) -> None:
    """Write the finished adapter into the output directory, whole. All processes must call it."""
    staging = write_adapter(trainer, directory)
    if is_first_process():
        with output.said_of_disk(directory):
            write_manifest(staging, manifest)
            output.publish_adapter(directory)
    trainer.accelerator.wait_for_everyone()


def _evaluation(arguments: Arguments, before: Scores | None, after: Scores | None) -> EvaluationFacts:
    if before is None or after is None:
        return EvaluationFacts()
    return EvaluationFacts(arguments.run.eval_answers, before.metrics, after.metrics, after.samples)


def _write(record: RunRecord, directory: Path, say: Say) -> None:
    """Write run.json and report.html; a disk that refuses them is no reason not to hand over what was trained."""
    if not is_first_process():
        return
    try:
        record.write(directory / "run.json")
        write_report(record, directory / "report.html")
    except OSError as error:
        say(f"run.json and report.html can't be written into {directory}: {error.strerror}")


def adapter_name(arguments: Arguments) -> str:
    """Return the name that a server is to know the adapter by."""
    return arguments.run.adapter_name or Path(arguments.training.output_dir).resolve().name


def hand_over(job: Job, trainer: LoraTrainer, directory: Path, say: Say) -> None:
    """Say where the adapter is and of which step, and give it to the Hub and to a server if they were named."""
    run, base = job.arguments.run, job.prepared.base
    best = published_best(trainer)
    which = "" if best is None else f" is {best.sentence}; it"
    step = "" if best is None else f" (step {best.step} of {trainer.state.max_steps})"
    report = directory / "report.html"
    where = f"; its report is {report}" if report.exists() else ""
    say(f"The adapter{which} is in {directory}{where}.")
    if job.arguments.training.push_to_hub:
        say(f"{trainer.push_adapter(directory)} on the Hub has it.")
    name = adapter_name(job.arguments)
    if run.register is not None:
        say(f"{register(run.register, name, directory, run.admin_key)}{step}")
        return
    if job.prepared.servable.yes:
        say(f"Serve it{step}: {serve_command(base, {name: directory}, job.prepared.saved_rank)}")
