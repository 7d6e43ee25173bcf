"""What a run of several tasks keeps on the disk: checkpoints of all tasks together, whole or none, and adapters."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from manylora.adapters.manifest import NONE, AdapterManifest, write_manifest
from manylora.training import output
from manylora.training.continuing import Kept, compare
from manylora.training.errors import InvalidArgument, TrainingError
from manylora.training.loop import checkpoints
from manylora.training.loop.disk import tells_of_disk, why
from manylora.training.loop.whole import ADAPTER, TRAINER_STATE, as_it_was_written, check_files
from manylora.training.tasks.member import Member
from manylora.training.tasks.side_by_side import SideBySide

RANDOM_FILE = "random.pt"
"""torch's generators, which a base that has dropout of its own draws from."""

OF_TASK = (*ADAPTER, TRAINER_STATE, "task.pt")


class RunFiles:
    """The output directory of a run. ``say`` tells the user of a checkpoint that could not be written; ``facts`` are
    what each task's checkpoints say of it (training/continuing.py), ``manifests`` what its adapter says of itself."""

    def __init__(
        self,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
        facts: Mapping[str, Mapping[str, Any]] | None = None,
        manifests: Mapping[str, AdapterManifest] | None = None,
    ) -> None:
        self.directory = Path(str(args.output_dir))
        self._args, self._tokenizer, self._say = args, tokenizer, say
        self._facts = facts or {}
        self._manifests = manifests or {}
        self._published: set[str] = set()
        self._has_told = False

    def resume(self, run: SideBySide) -> Path:
        """Bring all tasks back to the last checkpoint. Raises InvalidArgument where it is one of other tasks."""
        last = checkpoints.last_checkpoint(self.directory)
        state = compare_tasks(last, [member.name for member in run.members], self._facts)
        for member in run.members:
            with as_it_was_written(last, f"{member.name}/task.pt", _instead(last)):
                member.restore(last / member.name)
        with as_it_was_written(last, f"{checkpoints.STATE_FILE} or {RANDOM_FILE}", _instead(last)):
            run.rounds, run.pieces = int(str(state["rounds"])), int(str(state["pieces"]))
            random = torch.load(last / RANDOM_FILE, weights_only=True)
            torch.set_rng_state(random["cpu"])
            if torch.cuda.is_available() and random["cuda"]:
                torch.cuda.set_rng_state_all(random["cuda"])
        return last

    def round_done(self, run: SideBySide, *, interrupted: bool = False) -> None:
        """Publish the adapters of tasks that are done, and write a checkpoint if it is time or the run is to end."""
        try:
            self.publish_finished(run)
        except TrainingError as error:
            if not self._has_told:
                self._has_told = True
                self._say(f"{error}; the tasks go on, and it is tried again")
        if interrupted or self._checkpoint_is_due(run):
            self._write_checkpoint(run)

    def publish_finished(self, run: SideBySide) -> None:
        """Write the adapters of tasks that are done into their own directories, once.

        Raises TrainingError, when all were tried, where the disk refuses.
        """
        refused: list[TrainingError] = []
        for member in run.members:
            if member.finished and not member.stopped and member.name not in self._published:
                try:
                    self._publish(member)
                except TrainingError as error:
                    refused.append(error)
        if refused:
            raise refused[0]

    def _publish(self, member: Member) -> None:
        directory = Path(str(member.args.output_dir))
        with output.said_of_disk(directory, self.directory):
            staging = output.open_adapter(directory)
            member.policy.save(member.model, staging, resumable=False)
            self._tokenizer.save_pretrained(str(staging))
            write_manifest(staging, self._manifests.get(member.name, NONE))
            output.publish_adapter(directory)
        self._published.add(member.name)

    def _checkpoint_is_due(self, run: SideBySide) -> bool:
        strategy = str(self._args.save_strategy.value)
        if strategy == "epoch":
            return any(member.step == run.rounds and member.epoch_is_over for member in run.members)
        if strategy != "steps":
            return False
        share = self._args.save_steps
        return run.rounds % max(1, int(share if share >= 1 else share * run.total_rounds)) == 0

    def _write_checkpoint(self, run: SideBySide) -> None:
        name = f"checkpoint-{run.rounds}"
        try:
            staged = checkpoints.open_staging(self.directory) / name
            _write(run, staged, self._facts)
            checkpoints.publish(staged, self.directory / name)
            checkpoints.rotate(self.directory, self._args.save_total_limit, needed=())
        except Exception as error:
            if not tells_of_disk(error):
                raise
            self._say(f"{name} could not be written ({why(error)}); the run goes on, make room on the disk")
        finally:
            checkpoints.drop_staging(self.directory)


def _write(run: SideBySide, directory: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    for member in run.members:
        of_member = directory / member.name
        of_member.mkdir(parents=True)
        member.save(of_member)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    torch.save({"cpu": torch.get_rng_state(), "cuda": cuda}, directory / RANDOM_FILE)
    state = {
        "tasks": [member.name for member in run.members],
        "rounds": run.rounds,
        "pieces": run.pieces,
        "facts": facts,
    }
    checkpoints.write_state(directory, state)


def compare_tasks(
    checkpoint: Path, names: list[str], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, object]:
    """Return a checkpoint's state. Raises InvalidArgument for a broken one, and for one of other tasks or settings."""
    state = checkpoints.read_state(checkpoint, _instead(checkpoint))
    if state.get("tasks") != names:
        raise InvalidArgument(
            f"--resume: {checkpoint} is of the tasks {state.get('tasks')}, the file has {names}: go on with the same"
            " tasks in the same order"
        )
    missing = [
        f"{name}/{file}" for name in names for file in OF_TASK if not (checkpoint / name / file).is_file()
    ]
    if missing:
        raise InvalidArgument(f"--resume: {checkpoint} has no {', '.join(missing)}; {_instead(checkpoint)}")
    check_files(checkpoint, _instead(checkpoint))
    kept = state.get("facts")
    for name, now in facts.items():
        of_task = kept.get(name) if isinstance(kept, dict) else None
        compare(checkpoint / name, Kept(of_task or {}, {}), now)
    return state


def _instead(checkpoint: Path) -> str:
    if checkpoints.checkpoints(checkpoint.parent)[0] == checkpoint:
        return "it is the only one: start again with --overwrite_output_dir"
    return "remove it to go on from the one before it"


def claim(directory: Path, tasks: Sequence[Path], *, resume: bool, overwrite: bool) -> None:
    """Make sure that a run may write its directory and its tasks'. Raises InvalidArgument; removes nothing.

    A run that goes on replaces what its tasks have published.
    """
    if resume:
        checkpoints.last_checkpoint(directory)
    output.claim(directory, resume=False, overwrite=overwrite or resume)
    for each in tasks:
        output.claim(each, resume=False, overwrite=overwrite or resume)


def clear(directory: Path, tasks: Sequence[Path]) -> None:
    """Remove an earlier run's adapters, checkpoints and reports."""
    for each in (directory, *tasks):
        output.clear(each)
