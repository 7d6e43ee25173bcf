"""Checkpoint directories that are whole or not there: written beside, synced to disk, then renamed.

What a killed run leaves half-written has a name that is never taken for a checkpoint, and the next run removes it.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from manylora.adapters.durable import sync
from manylora.training.errors import InvalidArgument, reason_of

STAGING = ".checkpoint-partial"
STATE_FILE = "manylora_state.json"
"""What the loop keeps beside transformers' own files."""
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the whole checkpoints in ``output_dir``, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimiser steps that a checkpoint stands for."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} is not named like a checkpoint"
    return int(match[1])


def last_checkpoint(output_dir: Path) -> Path:
    """Return the checkpoint to go on from. Raises InvalidArgument when there is none."""
    found = checkpoints(output_dir)
    if not found:
        raise InvalidArgument(
            f"--resume: {output_dir} has no checkpoint; leave --resume out to start, or give the --output_dir of"
            " the run to go on with"
        )
    return found[-1]


def open_staging(output_dir: Path) -> Path:
    """Return an empty directory to write a checkpoint into; what a killed run left there is gone."""
    staging = output_dir / STAGING
    drop_staging(output_dir)
    staging.mkdir(parents=True)
    return staging


def drop_staging(output_dir: Path) -> None:
    """Remove what is half-written."""
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def publish(staged: Path, target: Path) -> None:
    """Give a finished directory its name. Its files are on the disk before it has one."""
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            sync(path)
    sync(staged)
    if target.exists():
        # A name can't be given twice; the old holder steps aside whole, not file by file.
        aside = target.with_name(f".{target.name}-replaced")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        staged.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        staged.rename(target)
    sync(target.parent)


def rotate(output_dir: Path, keep: int | None, needed: Collection[Path]) -> None:
    """Remove the oldest checkpoints beyond ``keep``, but never the newest or one that is ``needed``, as the best is."""
    if keep is None or keep < 1:
        return
    found = checkpoints(output_dir)
    kept = {path.name for path in (*needed, *found[-1:])} & {path.name for path in found}
    spare = [path for path in found if path.name not in kept]
    for path in spare[: max(0, len(found) - max(keep, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def write_state(directory: Path, state: Mapping[str, object]) -> None:
    """Write the loop's own state."""
    (directory / STATE_FILE).write_text(json.dumps(state, indent=1))


def read_state(
    directory: Path, instead: str = "use --from_adapter to start from its adapter"
) -> dict[str, object]:
    """Read it back. Raises InvalidArgument for a checkpoint that another program wrote."""
    path = directory / STATE_FILE
    try:
        state: object = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"{directory} is no checkpoint of manylora ({reason_of(error)}); {instead}"
        ) from None
    if not isinstance(state, dict):
        raise InvalidArgument(
            f"{directory} is no checkpoint of manylora ({STATE_FILE} is another's); {instead}"
        )
    return state
