"""The vectors of adapters' example prompts: in memory, and on disk so that a restart need not compute them again.

    directory/<sha256 of the examples>.npz    one array for each form, and what they were made with

What is there is only a saving: a file that is missing, damaged or of another base counts as none. Methods that touch
the disk block.
"""

import contextlib
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float16]
"""As they are kept: numbers of vectors of length 1 need no more."""
_FILE = re.compile(r"([0-9a-f]{64})\.npz|\.[0-9a-f]{64}\.\d+\.partial")
_MADE_WITH = "made_with"
Vectors = Mapping[str, Floats]
"""[examples, width] by the form that prompts come in."""


class ExampleVectors:
    """What has been computed. Reads on the event loop, writes from any thread: entries are put in whole."""

    def __init__(self, directory: Path | None, made_with: str, width: int, most_bytes: int) -> None:
        """``made_with`` tells what vectors were made with: others' are not read. ``directory`` None: nothing is kept.

        ``most_bytes`` of memory are taken by them all.
        """
        self._directory = directory
        self._made_with = made_with
        self._width = width
        self._most = most_bytes
        self._held: dict[str, Vectors] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._held

    def __getitem__(self, key: str) -> Vectors:
        return self._held[key]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are taken."""
        return sum(_nbytes(vectors) for vectors in list(self._held.values()))

    def has_room(self, count: int) -> bool:
        """Say whether so many more vectors would fit."""
        return self.nbytes + count * self._width * np.dtype(np.float16).itemsize <= self._most

    def hold(self, key: str, vectors: Vectors) -> None:
        """Have an adapter's vectors at hand. Ask ``has_room`` first."""
        self._held[key] = vectors

    def read(self, key: str, counts: Mapping[str, int]) -> Vectors | None:
        """Return what the disk has of an adapter whose examples make ``counts`` vectors of each form; None: nothing."""
        if self._directory is None:
            return None
        try:
            with (
                (self._directory / f"{key}.npz").open("rb") as opened,
                np.load(opened, allow_pickle=False) as file,
            ):
                if str(file[_MADE_WITH]) != self._made_with:
                    return None
                found = {form: file[form] for form in counts}
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
            return None
        good = all(self._is_whole(found[form], count) for form, count in counts.items())
        return found if good else None

    def write(self, key: str, vectors: Vectors) -> None:
        """Keep an adapter's vectors on the disk: all of them or none. Raises OSError."""
        if self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = self._directory / f".{key}.{os.getpid()}.partial"
        try:
            with partial.open("wb") as file:
                arrays: dict[str, npt.NDArray[Any]] = {_MADE_WITH: np.array(self._made_with)}
                arrays |= {form: np.asarray(array, dtype=np.float16) for form, array in vectors.items()}
                np.savez(file, allow_pickle=False, **arrays)
            partial.replace(self._directory / f"{key}.npz")
        finally:
            partial.unlink(missing_ok=True)

    def keep_only(self, keys: Collection[str]) -> None:
        """Let all others go, from the disk too."""
        for key in [each for each in self._held if each not in keys]:
            del self._held[key]
        if self._directory is None or not self._directory.is_dir():
            return
        for path in list(self._directory.iterdir()):
            ours = _FILE.fullmatch(path.name)
            if ours is not None and ours[1] not in keys:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _is_whole(self, array: Floats, count: int) -> bool:
        fits = array.shape == (count, self._width) and array.dtype == np.float16
        return fits and bool(np.isfinite(array).all())


def _nbytes(vectors: Vectors) -> int:
    return sum(array.nbytes for array in vectors.values())
