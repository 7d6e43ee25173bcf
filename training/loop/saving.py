"""How the trainer saves and resumes: whole checkpoints or none, the policy's adapter, and the loop's own state."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import nn

from manylora.training.bases.save import save_adapter
from manylora.training.errors import InvalidArgument, TrainingError
from manylora.training.loop import checkpoints
from manylora.training.loop.disk import tells_of_disk, why
from manylora.training.loop.events import Events
from manylora.training.loop.hub import HubPushing
from manylora.training.loop.masked import MaskedRows
from manylora.training.loop.sharding import gather_trained
from manylora.training.loop.watch import Watch
from manylora.training.loop.whole import as_it_was_written
from manylora.training.rank.policy import RankPolicy


class CheckpointSaving(HubPushing):
    """The part of LoraTrainer that touches the disk."""

    policy: RankPolicy
    events: Events
    micro_rows: int | None
    eval_rows: int | None
    watch: Watch
    masked: MaskedRows
    look_before_saving: Callable[[], None]
    _staging: Path | None = None
    resumed_from: Path | None = None
    """The checkpoint that the run went on from."""
    run_state: Mapping[str, object] | None = None
    """What else a checkpoint says of its run (training/continuing.py)."""

    def _get_output_dir(self, trial: Any) -> str:
        """Send what transformers writes into the staging directory while a checkpoint is being written."""
        return str(self._staging) if self._staging is not None else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, give it its name when it is whole, and go on without it when the disk is full."""
        self.look_before_saving()
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        try:
            if self.args.should_save:
                checkpoints.open_staging(output_dir)
            self.accelerator.wait_for_everyone()
            self._staging = output_dir / checkpoints.STAGING
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            # In every process, and not as transformers saw it: under the name of the staging directory.
            is_best = self.state.best_global_step == self.state.global_step
            self.state.best_model_checkpoint = str(output_dir / name) if is_best else best
            if self.args.should_save:
                self._finish(self._staging / name, output_dir / name)
        except Exception as error:
            self.state.best_model_checkpoint = best
            if not tells_of_disk(error):
                raise
            if self.args.world_size > 1:
                raise TrainingError(f"{name} can't be written: {why(error)}") from None
            self._say_unsaved(name, error)
        else:
            self.push_checkpoint(output_dir / name)
        finally:
            self._staging = None
            if self.args.should_save:
                checkpoints.drop_staging(output_dir)
        self.accelerator.wait_for_everyone()

    def _finish(self, staged: Path, target: Path) -> None:
        self.state.save_to_json(str(staged / "trainer_state.json"))
        checkpoints.write_state(staged, self.own_state())
        checkpoints.publish(staged, target)
        best = self.state.best_model_checkpoint
        needed = [*self.uploading, *([Path(best)] if best else [])]
        checkpoints.rotate(target.parent, self.args.save_total_limit, needed)

    def _finalize_training(self, *args: Any) -> Any:
        """End the run. Where only one checkpoint is kept, transformers removes all but the best: not before its end."""
        limit = self.args.save_total_limit
        if self.state.global_step < self.state.max_steps:
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _say_unsaved(self, name: str, error: Exception) -> None:
        older = checkpoints.checkpoints(Path(self.args.output_dir))
        last = f"the last whole one is {older[-1].name}" if older else "there is none before it"
        self.events.say(
            self.state.global_step,
            "checkpoint",
            f"{name} could not be written ({why(error)}): {last}; the run goes on, make room on the disk",
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter. All processes must call it: shards are gathered from all of them."""
        if self.is_fsdp_enabled:
            self._save(output_dir, gather_trained(self.model))
        else:
            super().save_model(output_dir, _internal_call=True)  # uploading is done elsewhere

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter as the policy has it, and the tokenizer."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if state_dict is not None:  # gathered from shards by DeepSpeed or FSDP
            save_adapter(self.model, directory, state_dict)
        else:
            self.policy.save(self.model, directory, resumable=self._staging is not None)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(directory))
        self._adapter_files = tuple(sorted(path.name for path in directory.iterdir() if path.is_file()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Bring back the adapter and the loop's state."""
        directory = self.resumed_from = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled != any(directory.glob(f"{FSDP_MODEL_NAME}*")):
            raise InvalidArgument(
                f"--resume: {directory} was written {'without' if self.is_fsdp_enabled else 'with'} FSDP: go on as it"
                " began, or start a new run from its adapter with --from_adapter"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.policy.restore(self.model, directory)
        with as_it_was_written(directory, checkpoints.STATE_FILE):
            self.take_own_state(checkpoints.read_state(directory))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with as_it_was_written(Path(str(checkpoint)), "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with as_it_was_written(Path(str(checkpoint)), "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        """Bring back the best checkpoint's adapter, whose rank may be another than the last one's."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.policy.restore(self.model, Path(self.state.best_model_checkpoint))

    def own_state(self) -> dict[str, object]:
        """Return what a resumed run needs of the loop, as JSON."""
        return {
            "watch": self.watch.state(),
            "masked": [self.masked.count, self.masked.drawn],
            "micro_rows": self.micro_rows,
            "eval_rows": self.eval_rows,
            "run": self.run_state,
        }

    def take_own_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.micro_rows, self.eval_rows = state["micro_rows"], state.get("eval_rows")
        if "watch" in state:  # checkpoints of before there was one go on with a guard that has seen nothing
            self.watch.restore(state["watch"])
            self.masked.count, self.masked.drawn = state["masked"]
