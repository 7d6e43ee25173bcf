"""The output directory of a run: claimed before anything is computed, and given its adapter whole at the end."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manylora.adapters.durable import sync
from manylora.adapters.files import MANIFEST_FILE
from manylora.training.errors import InvalidArgument, TrainingError
from manylora.training.loop import checkpoints
from manylora.training.loop.disk import tells_of_disk, why
from manylora.training.loop.whole import check_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STAGING = ".adapter-partial"
PROBE_BYTES = 4096
RUN_FILES = ("run.json", "report.html")


def claim(directory: Path, *, resume: bool, overwrite: bool, checkpoint: Path | None = None) -> None:
    """Make sure that a run may write here. ``checkpoint`` is the one to go on from; the last one here if it is None.

    Raises InvalidArgument; what it makes to see that it can is gone when it returns, and it removes nothing else.
    """
    if directory.exists() and not directory.is_dir():
        raise InvalidArgument(f"--output_dir {directory} is a file")
    if resume:
        checkpoint = checkpoint or checkpoints.last_checkpoint(directory)
        check_whole(checkpoint)
    goes_on_here = checkpoint is not None and checkpoint.resolve().parent == directory.resolve()
    if not (goes_on_here or overwrite):
        _refuse_older_run(directory)
    nearest = directory
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InvalidArgument(f"--output_dir {directory} can't be made: {nearest} is a file")
    _try_to_write(directory)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory until this one has ended, however it ends; what stays empty is gone then.

    Two would put their files into each other's checkpoints. Raises InvalidArgument if a run is at work there.
    """
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    handle = None
    try:
        handle = _locked(directory)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for each in made:
            with suppress(OSError):
                each.rmdir()


def _locked(directory: Path) -> int | None:
    """Return a lock on the directory, which is made; None where it can't be made, of which ``claim`` says more."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InvalidArgument(
            f"--output_dir {directory}: another run is at work there; wait until it has ended, or give another"
            " directory"
        ) from None
    except OSError:  # a file system without locks
        pass
    return handle


def _try_to_write(directory: Path) -> None:
    """Write a small file there: permissions, read-only and full disks, quotas and odd systems all say no to that."""
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".manylora-") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
    except OSError as error:
        raise InvalidArgument(
            f"--output_dir {directory} can't be written to ({error.strerror}): give another directory, or make it one"
            " with room that this user may write to"
        ) from None
    finally:
        for each in made:
            if each.is_dir():
                each.rmdir()


def _refuse_older_run(directory: Path) -> None:
    older = "an adapter" if (directory / CONFIG).exists() else None
    if older is None and checkpoints.checkpoints(directory):
        older = "checkpoints of a run"
    if older is not None:
        raise InvalidArgument(
            f"--output_dir {directory} holds {older}: give another directory, --resume to go on with that run, or"
            " --overwrite_output_dir to replace it"
        )


def open_output(directory: Path, *, overwrite: bool) -> None:
    """Make the directory, free of what a killed run left half-written and, with ``overwrite``, of an earlier run.

    Raises InvalidArgument if it can't be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"--output_dir {directory} can't be made: {error.strerror}") from None
    if overwrite:
        clear(directory)
    drop_partial(directory)


def clear(directory: Path) -> None:
    """Remove an earlier run's adapter, checkpoints and report."""
    for name in (CONFIG, WEIGHTS, MANIFEST_FILE, *RUN_FILES):
        (directory / name).unlink(missing_ok=True)
    for each in checkpoints.checkpoints(directory):
        shutil.rmtree(each)


def drop_partial(directory: Path) -> None:
    """Remove what is half-written."""
    checkpoints.drop_staging(directory)
    shutil.rmtree(directory / STAGING, ignore_errors=True)


def open_adapter(directory: Path) -> Path:
    """Return an empty directory to write the adapter's files into."""
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish_adapter(directory: Path) -> None:
    """Move the staged files into place. The config comes last: without it a directory is no adapter.

    Raises TrainingError if the weights are missing or empty.
    """
    staging = directory / STAGING
    weights = staging / WEIGHTS
    if not weights.is_file() or weights.stat().st_size < 1024 or not (staging / CONFIG).is_file():
        raise TrainingError(f"{staging} holds no adapter: nothing was published")
    files = sorted(filter(Path.is_file, staging.iterdir()), key=lambda path: path.name == CONFIG)
    for path in files:
        # What a full disk refuses it refuses here, with the older adapter still in its place.
        sync(path)
    (directory / CONFIG).unlink(missing_ok=True)
    for path in files:
        path.replace(directory / path.name)
    sync(directory)
    shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def said_of_disk(directory: Path, run: Path | None = None) -> Iterator[None]:
    """Leave nothing half-written of an adapter that the disk refuses, and raise one sentence as TrainingError.

    ``run`` is the directory of its checkpoints, if it is another one.
    """
    try:
        yield
    except Exception as error:
        if not tells_of_disk(error):
            raise
        shutil.rmtree(directory / STAGING, ignore_errors=True)
        found = checkpoints.checkpoints(run or directory)
        left = f"{found[-1]} is whole: make room" if found else "there is no checkpoint: make room"
        how = "go on with the same command and --resume" if found else "start again"
        raise TrainingError(
            f"the adapter can't be written into {directory} ({why(error)}); {left}, and {how}"
        ) from None
