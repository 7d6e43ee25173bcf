"""What goes to the Hub, and when: the adapter of whole checkpoints while a run trains, the published one at its end.

transformers uploads the output directory while a checkpoint is half-written in it. Here nothing is uploaded before it
has its name, and only the files of the adapter, unless the strategy asks for whole checkpoints.
"""

from pathlib import Path

import httpx
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from manylora.training.errors import TrainingError

WITH_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class HubPushing(Trainer):
    """The part of LoraTrainer that uploads."""

    push_in_progress: PushInProgress | None = None
    _adapter_files: tuple[str, ...] = ()
    """Names of the files that the last saved adapter consists of."""
    _uploading: tuple[Path, ...] = ()

    @property
    def uploading(self) -> tuple[Path, ...]:
        """The checkpoints that are being read for an upload, and must stay until it is done."""
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self._uploading = ()
        return self._uploading

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the folder has no name yet. push_checkpoint is called when it has."""

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Begin to upload a whole checkpoint's adapter, and what else --hub_strategy asks for, beside the training."""
        args = self.args
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        if self.uploading and not args.hub_always_push:
            return
        message = f"Training in progress, step {self.state.global_step}"
        shared = {
            "repo_id": self.hub_model_id,
            "folder_path": str(checkpoint),
            "token": args.hub_token,
            "revision": args.hub_revision,
            "run_as_future": True,
        }
        jobs = [
            hf_api().upload_folder(**shared, allow_patterns=list(self._adapter_files), commit_message=message)
        ]
        if args.hub_strategy in WITH_CHECKPOINTS:
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if last else checkpoint.name
            jobs.append(
                hf_api().upload_folder(**shared, path_in_repo=place, commit_message=f"{message}, checkpoint")
            )
        before = self.push_in_progress.jobs if self.uploading and self.push_in_progress else []
        self.push_in_progress = PushInProgress([*before, *jobs])
        self._uploading = (*self.uploading, checkpoint)

    def push_adapter(self, directory: Path) -> str:
        """Upload the published adapter, after what is still on its way. Returns the repository's name.

        Raises TrainingError: the adapter on the disk is whole either way.
        """
        self._finish_current_push()
        try:
            hf_api().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=str(directory),
                allow_patterns=list(self._adapter_files),
                commit_message="End of training",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise TrainingError(
                f"--push_to_hub: {self.hub_model_id} did not take the adapter ({error}); it is in {directory}, ready to"
                " be uploaded by hand"
            ) from None
        return str(self.hub_model_id)
