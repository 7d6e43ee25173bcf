"""Whether a checkpoint has all that a run goes on with: said in one line, if it can be before anything is loaded."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError, safe_open

from manylora.training.errors import InvalidArgument, reason_of
from manylora.training.loop import checkpoints

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TRAINER_STATE, SCHEDULER, RANDOM = "trainer_state.json", "scheduler.pt", "rng_state*.pth"
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
"""torch's, accelerate's, FSDP's shards and DeepSpeed's, which holds the schedule too."""
PICKLED = (".pt", ".pth", ".bin")
KEYS: Mapping[str, tuple[str, ...]] = {TRAINER_STATE: ("global_step", "max_steps", "log_history")}
"""What JSON files have to hold at least; all of them hold an object."""


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
    check_files(checkpoint, _instead(checkpoint))
    if "micro_rows" not in checkpoints.read_state(checkpoint):
        raise InvalidArgument(
            f"--resume: {checkpoint / checkpoints.STATE_FILE} is cut or broken; {_instead(checkpoint)}"
        )


def check_files(checkpoint: Path, instead: str) -> None:
    """Raise InvalidArgument for a file that is cut or empty, of those in ``checkpoint`` and below.

    ``instead`` says what can be done.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _is_whole(path):
            raise InvalidArgument(f"--resume: {path} is cut or broken; {instead}")


@contextmanager
def as_it_was_written(checkpoint: Path, what: str, instead: str | None = None) -> Iterator[None]:
    """Make one sentence of what goes wrong while ``what`` is read that holds other things than a run writes there.

    Raises InvalidArgument.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, UnpicklingError) as error:
        raise InvalidArgument(
            f"--resume: {what} of {checkpoint} can't be read ({type(error).__name__}: {reason_of(error)});"
            f" {instead or _instead(checkpoint)}"
        ) from None


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix in PICKLED:
            return zipfile.is_zipfile(path)  # torch writes zip files, whose end says what is in them
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            return isinstance(content, dict) and all(key in content for key in KEYS.get(path.name, ()))
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _instead(checkpoint: Path) -> str:
    older = [path for path in checkpoints.checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    if older:
        return f"go on from another one: --resume_from_checkpoint {older[-1]}"
    if not all((checkpoint / name).is_file() and _is_whole(checkpoint / name) for name in ADAPTER):
        return "nothing of it can be gone on with: start again with --overwrite_output_dir"
    return f"start a new run from its weights: --from_adapter {checkpoint}"
