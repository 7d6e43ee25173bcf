"""One report of all tasks, and each task's run.json beside its adapter."""

import dataclasses
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerControl

from manylora.training.loop.events import Listener
from manylora.training.recording import start_record
from manylora.training.report.page import write_report
from manylora.training.report.record import Event, Results, RunRecord
from manylora.training.report.recorder import RunRecorder
from manylora.training.report.surroundings import GIB
from manylora.training.tasks.member import Member
from manylora.training.tasks.prepare import PreparedTask


@dataclass(frozen=True, slots=True)
class Measured:
    """What the run as a whole took."""

    seconds: float
    tokens: Mapping[str, int]
    """By task."""
    peak_gib: float


class Records:
    """Keeps what happens to each task."""

    def __init__(self, tasks: Sequence[PreparedTask]) -> None:
        self._started: Mapping[str, RunRecord] = {
            each.task.name: dataclasses.replace(
                start_record(each.task.arguments, each.prepared, {}), name=each.task.name
            )
            for each in tasks
        }
        self._recorders = {each.task.name: RunRecorder() for each in tasks}

    def begin(self, members: Sequence[Member]) -> None:
        """Take over what a checkpoint tells, and listen."""
        for member in members:
            recorder = self._recorders[member.name]
            recorder.on_train_begin(member.args, member.state, TrainerControl())
            recorder.rank_changed(member.step, member.policy.rank)
            member.events.listeners.append(_keeper(recorder))

    def logged(self, member: Member) -> None:
        """Notice a rank that has changed."""
        self._recorders[member.name].rank_changed(member.step, member.policy.rank)

    def write(self, members: Sequence[Member], directory: Path, measured: Measured) -> Path:
        """Write report.html and every run.json. Returns the report's path."""
        records = [self._finished(member, measured) for member in members]
        for member, record in zip(members, records, strict=True):
            record.write(Path(str(member.args.output_dir)) / "run.json")
        path = directory / "report.html"
        write_report(records, path)
        return path

    def _finished(self, member: Member, measured: Measured) -> RunRecord:
        history = self._recorders[member.name].history
        scores = next((entry for entry in reversed(history.log) if "eval_loss" in entry), {})
        results = Results(
            train_loss=member.train_loss,
            eval_loss=scores.get("eval_loss"),
            perplexity=scores.get("eval_perplexity"),
            train_seconds=measured.seconds,
            steps=member.step,
            tokens_per_second=measured.tokens[member.name] / measured.seconds,
            peak_memory_gib=measured.peak_gib,
            trained_parameters=sum(each.numel() for each in member.parameters),
            final_rank=member.policy.rank,
            adapter=None if member.stopped else str(Path(str(member.args.output_dir)).resolve()),
        )
        record = self._started[member.name]
        memory = dataclasses.replace(record.memory, measured_peak_gib=measured.peak_gib)
        outcome = member.stopped or f"finished, side by side with {len(self._recorders) - 1} other tasks"
        outcome += f"; {member.worse}" if member.worse else ""
        return dataclasses.replace(record, outcome=outcome, history=history, results=results, memory=memory)


def _keeper(recorder: RunRecorder) -> Listener:
    def keep(event: Event) -> None:
        recorder.note(event.kind, event.sentence, event.step)

    return keep


def peak_gib() -> float:
    """Return the most memory that the process has held: on the accelerator where there is one, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
