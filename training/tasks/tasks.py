"""`manylora train --tasks FILE`: an adapter for each task, trained side by side on one base in memory."""

import time
from dataclasses import dataclass
from pathlib import Path

from training.arguments import Arguments
from training.errors import Diverged
from training.loop.events import Events
from training.register import register
from training.tasks import saving
from training.tasks.display import TasksDisplay
from training.tasks.member import Member
from training.tasks.mixed_base import MixedBase
from training.tasks.plan import Plan, read_tasks
from training.tasks.prepare import PreparedTask, prepare_tasks
from training.tasks.records import Measured, Records, peak_gib
from training.tasks.side_by_side import Observers, SideBySide
from training.tasks.trackers import Trackers


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What came of one task."""

    name: str
    adapter: Path | None
    """None: it was stopped."""
    steps: int
    eval_loss: float | None
    stopped: str


def run_tasks(arguments: Arguments) -> list[TaskResult]:
    """Train all tasks of the file that ``arguments`` name, write their adapters and one report, and register them.

    Raises TrainingError; Diverged after the others are done, when a task had to be stopped.
    """
    plan = read_tasks(arguments)
    run = plan.arguments.run
    directory = Path(str(plan.arguments.training.output_dir))
    folders = [task.directory for task in plan.tasks]
    saving.claim(directory, folders, resume=run.resume, overwrite=run.overwrite_output_dir)
    display = TasksDisplay(live=run.live)
    for note in plan.arguments.notes:
        display.say(note)
    try:
        results = _train(plan, directory, display)
    finally:
        display.close()
    _register(plan, results, display)
    stopped = [f"{result.name} {result.stopped}" for result in results if result.stopped]
    if stopped:
        others = ", ".join(result.name for result in results if not result.stopped) or "none"
        raise Diverged(f"{'; '.join(stopped)} (done: {others})")
    return results


def _train(plan: Plan, directory: Path, display: TasksDisplay) -> list[TaskResult]:
    args = plan.arguments.training
    base, tasks = prepare_tasks(plan, display.say)
    if not plan.arguments.run.resume:
        saving.clear(directory, [task.directory for task in plan.tasks])
    members = [_member(each) for each in tasks]
    records, trackers = Records(tasks), Trackers(args, base.model)
    said = Events()
    said.listeners.append(lambda event: display.say(event.sentence))
    files = saving.RunFiles(args, base.tokenizer, said)

    def logged(member: Member, values: dict[str, float]) -> None:
        display.logged(member, values)
        records.logged(member)
        trackers.logged(member, values, side_by_side.rounds)

    def round_done(run: SideBySide) -> None:
        files.round_done(run)
        display.round_done(run)

    mixed = MixedBase(base, [member.model for member in members], args)
    side_by_side = SideBySide(mixed, members, Observers(logged, round_done))
    if plan.arguments.run.resume:
        display.say(f"going on from {files.resume(side_by_side)}")
    else:
        for member in members:
            member.make_optimizer()
    records.begin(members)
    for member in members:
        member.events.listeners.append(
            lambda event, name=member.name: display.say(f"{name}: {event.sentence}")
        )
    began = time.perf_counter()
    display.begin(side_by_side)
    trackers.begin(side_by_side.rounds, side_by_side.total_rounds)
    side_by_side.run()
    trackers.end()
    files.round_done(side_by_side)
    display.close()
    measured = Measured(time.perf_counter() - began, side_by_side.trained_tokens, peak_gib())
    display.say(f"trained in {measured.seconds:.1f} s, peak memory {measured.peak_gib:.2f} GiB")
    display.say(f"report: {records.write(members, directory, measured)}")
    return [_result(member) for member in members]


def _member(each: PreparedTask) -> Member:
    held_out = each.prepared.held_out
    rows = () if held_out is None else held_out.dataset
    return Member(each.task, each.prepared.model, each.prepared.policy, each.prepared.train.dataset, rows)


def _result(member: Member) -> TaskResult:
    scores = [entry["eval_loss"] for entry in member.state.log_history if "eval_loss" in entry]
    adapter = None if member.stopped else Path(str(member.args.output_dir))
    return TaskResult(member.name, adapter, member.step, scores[-1] if scores else None, member.stopped)


def _register(plan: Plan, results: list[TaskResult], display: TasksDisplay) -> None:
    """Hand every finished adapter to the server, so that one server answers all tasks."""
    run = plan.arguments.run
    for task, result in zip(plan.tasks, results, strict=True):
        if result.adapter is not None:
            eval_loss = "" if result.eval_loss is None else f", eval loss {result.eval_loss:.4g}"
            display.say(f"{result.name}: adapter in {result.adapter} after {result.steps} steps{eval_loss}")
        if run.register is not None and result.adapter is not None:
            name = task.arguments.run.adapter_name or result.name
            display.say(register(run.register, name, result.adapter, run.admin_key))
