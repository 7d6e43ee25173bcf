"""`manylora train --tasks FILE`: an adapter for each task, trained side by side on one base in memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.manifest import AdapterManifest
from manylora.training import output
from manylora.training.arguments import Arguments
from manylora.training.bases.servable import serve_command
from manylora.training.bases.types import Base
from manylora.training.continuing import facts_of
from manylora.training.errors import Diverged, TrainingError
from manylora.training.loop import checkpoints
from manylora.training.loop.interrupt import Signals
from manylora.training.manifest import manifest_of
from manylora.training.register import can_register, register
from manylora.training.tasks import saving
from manylora.training.tasks.display import TasksDisplay
from manylora.training.tasks.member import Member
from manylora.training.tasks.mixed_base import MixedBase
from manylora.training.tasks.plan import Plan, read_tasks
from manylora.training.tasks.prepare import PreparedTask, prepare_tasks
from manylora.training.tasks.records import Measured, Records, peak_gib
from manylora.training.tasks.side_by_side import SideBySide
from manylora.training.tasks.trackers import Trackers


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What came of one task."""

    name: str
    adapter: Path | None
    """None: it was stopped."""
    steps: int
    eval_loss: float | None
    stopped: str
    worse: str = ""
    """How it ended worse than the base alone."""


def run_tasks(arguments: Arguments) -> list[TaskResult]:
    """Train all tasks of the file that ``arguments`` name, write their adapters and one report, and register them.

    Raises TrainingError; Diverged after the others are done, when a task had to be stopped.
    """
    plan = read_tasks(arguments)
    directory = Path(str(plan.arguments.training.output_dir))
    with output.alone(directory):
        return _run_plan(plan, directory)


def _run_plan(plan: Plan, directory: Path) -> list[TaskResult]:
    run = plan.arguments.run
    folders = [task.directory for task in plan.tasks]
    saving.claim(directory, folders, resume=run.resume, overwrite=run.overwrite_output_dir)
    display = TasksDisplay(live=run.live)
    for note in plan.arguments.notes:
        display.say(note)
    if run.register is not None:
        for task in plan.tasks:
            name = task.arguments.run.adapter_name or task.name
            display.say(can_register(run.register, name, run.admin_key))
    try:
        results, command = _train(plan, directory, display)
    finally:
        display.close()
    _hand_over(plan, results, display.say)
    if run.register is None and command is not None:
        display.say(f"Serve them: {command}")
    stopped = [f"{result.name} {result.stopped}" for result in results if result.stopped]
    if stopped:
        others = ", ".join(result.name for result in results if not result.stopped) or "none"
        raise Diverged(f"{'; '.join(stopped)} (done: {others})")
    return results


@dataclass(frozen=True, slots=True)
class _Watcher:
    """Tells display, records, trackers and files what happens, and ends a run that is interrupted."""

    display: TasksDisplay
    records: Records
    trackers: Trackers
    files: saving.RunFiles
    signals: Signals

    def begin(self, run: SideBySide) -> None:
        self.records.begin(run.members)
        for member in run.members:
            member.events.listeners.append(self.display.teller(member.name))
        self.display.begin(run)
        self.trackers.begin(run.rounds, run.total_rounds)

    def logged(self, run: SideBySide, member: Member, values: dict[str, float]) -> None:
        self.display.logged(member, values)
        self.records.logged(member)
        self.trackers.logged(member, values, run.rounds)

    def round_done(self, run: SideBySide) -> None:
        interrupted = self.signals.heard and any(not member.finished for member in run.members)
        self.files.round_done(run, interrupted=interrupted)
        self.display.round_done(run)
        if interrupted:
            raise KeyboardInterrupt


def _train(plan: Plan, directory: Path, display: TasksDisplay) -> tuple[list[TaskResult], str | None]:
    """Train all of them. Returns what came of each, and the command that serves those that can be served."""
    args, resume = plan.arguments.training, plan.arguments.run.resume
    facts = {task.name: facts_of(task.arguments, {}) for task in plan.tasks}
    if resume:
        saving.compare_tasks(checkpoints.last_checkpoint(directory), list(facts), facts)
    base, tasks = prepare_tasks(plan, display.say)
    if not resume:
        saving.clear(directory, [task.directory for task in plan.tasks])
    members = [_member(each) for each in tasks]
    facts = {name: {**each, "base": base.fingerprint} for name, each in facts.items()}
    files = saving.RunFiles(args, base.tokenizer, display.say, facts, _manifests(tasks, display.say))
    signals = Signals()
    watcher = _Watcher(display, Records(tasks), Trackers(args, base.model), files, signals)
    run = SideBySide(MixedBase(base, [member.model for member in members], args), members, watcher)
    if resume:
        display.say(f"going on from {files.resume(run)}")
    else:
        for member in members:
            member.make_optimizer()
    watcher.begin(run)
    began = time.perf_counter()
    signals.take()
    try:
        run.run()
    except KeyboardInterrupt:
        raise TrainingError(_interrupted(directory)) from None
    finally:
        signals.release()
        watcher.trackers.end()
    tokens = {member.name: seen for member, seen in zip(members, run.tokens, strict=True)}
    measured = Measured(time.perf_counter() - began, tokens, peak_gib())
    files.publish_finished(run)
    display.close()
    rate = sum(run.tokens) / measured.seconds
    display.say(
        f"trained in {measured.seconds:.1f} s, {rate:,.0f} tokens/s, peak memory {measured.peak_gib:.2f} GiB"
    )
    display.say(_report(watcher.records, members, directory, measured))
    results = [_result(member) for member in members]
    return results, _serve_command(base, tasks, results)


def _manifests(tasks: list[PreparedTask], say: Callable[[str], None]) -> dict[str, AdapterManifest]:
    """Return what each task's adapter is to say of itself."""
    return {each.task.name: manifest_of(each.task.arguments, each.prepared.train, say) for each in tasks}


def _report(records: Records, members: list[Member], directory: Path, measured: Measured) -> str:
    """Write it; a disk that refuses it is no reason not to hand over what was trained."""
    try:
        return f"report: {records.write(members, directory, measured)}"
    except OSError as error:
        return f"the report can't be written into {directory}: {error.strerror}"


def _serve_command(base: Base, tasks: list[PreparedTask], results: list[TaskResult]) -> str | None:
    served = {
        each.task.arguments.run.adapter_name or result.name: (each.prepared, result.adapter)
        for each, result in zip(tasks, results, strict=True)
        if result.adapter is not None and each.prepared.servable.yes
    }
    if not served:
        return None
    rank = max(prepared.saved_rank for prepared, _ in served.values())
    return serve_command(base, {name: adapter for name, (_, adapter) in served.items()}, rank)


def _interrupted(directory: Path) -> str:
    found = checkpoints.checkpoints(directory)
    if not found:
        return (
            "interrupted before the first checkpoint (--save_steps): only the tasks that were done are kept"
        )
    return f"interrupted; {found[-1]} is whole: go on with the same command and --resume"


def _member(each: PreparedTask) -> Member:
    held_out = each.prepared.held_out
    rows = () if held_out is None else held_out.dataset
    return Member(each.task, each.prepared.model, each.prepared.policy, each.prepared.train.dataset, rows)


def _result(member: Member) -> TaskResult:
    scores = [entry["eval_loss"] for entry in member.state.log_history if "eval_loss" in entry]
    adapter = None if member.stopped else Path(str(member.args.output_dir))
    return TaskResult(
        member.name, adapter, member.step, scores[-1] if scores else None, member.stopped, member.worse
    )


def _hand_over(plan: Plan, results: list[TaskResult], say: Callable[[str], None]) -> None:
    """Say where the adapters are, and give them to a server if one was named: one server then answers all tasks.

    Raises TrainingError once all were offered, if any was refused.
    """
    run = plan.arguments.run
    refused: list[str] = []
    for task, result in zip(plan.tasks, results, strict=True):
        if result.adapter is None:
            continue
        scores = "" if result.eval_loss is None else f", eval loss {result.eval_loss:.4g}"
        say(f"{result.name}: adapter in {result.adapter}, step {result.steps}{scores}")
        if result.worse:
            say(f"{result.name}: the adapter is {result.worse}.")
        if run.register is not None:
            name = task.arguments.run.adapter_name or result.name
            try:
                say(register(run.register, name, result.adapter, run.admin_key))
            except TrainingError as error:
                refused.append(str(error))
    if refused:
        raise TrainingError("; ".join(refused))
