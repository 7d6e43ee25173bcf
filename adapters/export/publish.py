"""A result is made in a directory beside its place and put there by one rename: all of it, or nothing.

A partial directory is held by a lock as long as its process lives. Whoever publishes to the same place next deletes
what a dead one left.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from manylora.adapters.durable import sync
from manylora.adapters.export.errors import ExportFailed, ExportRefused

PARTIAL = ".partial-"
SPARE_BYTES = 16 << 20
"""Room on the disk for what isn't weights."""
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_target(target: Path) -> None:
    """Raise ExportRefused if ``target`` exists or its parent can't be written to."""
    if target.exists() or target.is_symlink():
        raise ExportRefused(f"{target} exists; give an output that doesn't, nothing is overwritten")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportRefused(f"{target.parent} can't be made: {error.strerror}") from None
    if not os.access(target.parent, os.W_OK):
        raise ExportRefused(f"{target.parent} is not writable")


def check_space(directory: Path, nbytes: int) -> None:
    """Raise ExportRefused if ``nbytes`` don't fit on the disk of ``directory``."""
    free = shutil.disk_usage(directory).free
    if free < nbytes + SPARE_BYTES:
        raise ExportRefused(
            f"the result takes {(nbytes + SPARE_BYTES) / 1e9:.2f} GB, and {directory} has {free / 1e9:.2f} GB free"
        )


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Give a directory to work in; when the block ends well it is at ``target``, else it is gone.

    Raises ExportRefused if ``target`` exists, then or now, ExportFailed if the disk is full.
    """
    with _partial(target) as partial:
        yield partial
        _put(partial, target)


@contextlib.contextmanager
def publishing_file(target: Path) -> Iterator[Path]:
    """The same for one file: give the path to write it at."""
    with _partial(target) as partial:
        made = partial / target.name
        yield made
        _put(made, target)


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    check_target(target)
    sweep(target)
    partial = target.parent / f"{PARTIAL}{target.name}-{uuid.uuid4().hex}"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise ExportFailed(
                f"the disk of {target.parent} is full; the partial result was deleted"
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _put(made: Path, target: Path) -> None:
    for path in (made, *made.rglob("*")):
        sync(path)
    check_target(target)
    made.rename(target)
    sync(target.parent)


def sweep(target: Path) -> int:
    """Delete what dead processes left while they made ``target``; return how many there were."""
    return sum(_delete_if_dead(path) for path in target.parent.glob(f"{PARTIAL}{_escaped(target.name)}-*"))


def sweep_all(directory: Path) -> int:
    """Delete every dead partial result in ``directory``."""
    return sum(_delete_if_dead(path) for path in directory.glob(f"{PARTIAL}*"))


def _delete_if_dead(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
