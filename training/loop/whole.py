"""Whether a checkpoint has all that a run goes on with: said in one line before anything is loaded."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from manylora.training.errors import InvalidArgument
from manylora.training.loop import checkpoints

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TRAINER_STATE, SCHEDULER, RANDOM = "trainer_state.json", "scheduler.pt", "rng_state*.pth"
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
"""torch's, accelerate's, FSDP's shards and DeepSpeed's, which holds the schedule too."""
PICKLED = (".pt", ".pth", ".bin")


def check_whole(checkpoint: Path) -> None:
    """Raise InvalidArgument for a directory that is no checkpoint, or one with files that are missing or cut."""
    if not checkpoint.is_dir():
        raise InvalidArgument(f"--resume_from_checkpoint {checkpoint}: there is no such directory")
    if not (checkpoint / checkpoints.STATE_FILE).is_file():
        checkpoints.read_state(checkpoint)  # says what it is not
    optimizer = [path for pattern in OPTIMIZER for path in checkpoint.glob(pattern)]
    missing = [name for name in (*ADAPTER, TRAINER_STATE) if not (checkpoint / name).is_file()]
    if not optimizer:
        missing.append(OPTIMIZER[0])
    if not (checkpoint / SCHEDULER).is_file() and not list(checkpoint.glob(OPTIMIZER[-1])):
        missing.append(SCHEDULER)
    if not list(checkpoint.glob(RANDOM)):
        missing.append(RANDOM.replace("*", ""))
    if missing:
        raise InvalidArgument(
            f"--resume: {checkpoint} has no {', '.join(missing)}, without which a run can't go on as it was"
            f" (--save_only_model leaves them out); {_instead(checkpoint)}"
        )
    check_files(checkpoint)


def check_files(checkpoint: Path) -> None:
    """Raise InvalidArgument for a file that is cut or empty, of those in ``checkpoint`` and below."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_whole(path):
            raise InvalidArgument(f"--resume: {path} is cut or broken; {_instead(checkpoint)}")


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix in PICKLED:
            return zipfile.is_zipfile(path)  # torch writes zip files, whose end says what is in them
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix == ".json":
            json.loads(path.read_text())
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _instead(checkpoint: Path) -> str:
    older = [path for path in checkpoints.checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    if older:
        return f"go on from another one: --resume_from_checkpoint {older[-1]}"
    return f"start a new run from its weights: --from_adapter {checkpoint}"
