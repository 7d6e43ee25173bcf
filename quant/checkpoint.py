"""A checkpoint's tensors, read one at a time from safetensors shards. Pickle is never opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.weight_files import WeightFiles, choose_weights, pointer


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: Path
    shape: tuple[int, ...]


class Checkpoint:
    """Names, shapes and tensors of a checkpoint directory. It holds no file open and no tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = choose_weights(directory)
        self._entries = _read_headers(directory, self._files)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files of weights, in their names' order."""
        return tuple(self.directory / name for name in self._files.shards)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about files that look like the model's weights and were not read."""
        return self._files.notes

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it. Raises CorruptCheckpoint if it isn't there."""
        return self._entry(name).shape

    def locate(self, name: str) -> Path:
        """Return the file that holds a tensor; for any other name the directory."""
        entry = self._entries.get(name)
        return self.directory if entry is None else entry.shard

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own. Raises CorruptCheckpoint if it isn't there or can't be read."""
        return self.show(name).clone()

    def show(self, name: str) -> Tensor:
        """Return a tensor that shows the file, without a copy, to be read once and let go; raises what ``read`` does.

        It changes with the file, and as long as it is held all of the file is mapped.
        """
        entry = self._entry(name)
        # Opened anew for each tensor, since what was touched of a map counts as ours until it closes.
        try:
            with safe_open(entry.shard, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpoint(f"{entry.shard}: tensor {name!r} can't be read: {error}") from None
        return tensor

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CorruptCheckpoint(f"{self.directory}: tensor {name!r} is missing") from None


def _read_headers(directory: Path, files: WeightFiles) -> Mapping[str, _Entry]:
    """Return what each shard holds; the index must agree."""
    entries: dict[str, _Entry] = {}
    for shard in files.shards:
        for name, entry in _read_header(directory / shard).items():
            if name in entries:
                raise CorruptCheckpoint(f"tensor {name!r} is in {entries[name].shard} and in {entry.shard}")
            entries[name] = entry
    missing = sorted(files.promised.keys() - entries.keys())
    if missing:
        raise CorruptCheckpoint(f"{files.index} names {missing[0]!r}, which no shard has")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing; download the checkpoint again")
    try:
        path.open("rb").close()  # says why it can't be read; safe_open calls every such file missing
        # Checks the header against the file's size before anything is allocated.
        file: Any = safe_open(path, framework="pt")  # safetensors has no public type for an open file
        with file:
            return {
                name: _Entry(path, tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118  # it isn't a mapping
            }
    except OSError as error:
        raise CorruptCheckpoint(f"{path} can't be read: {error.strerror or error}") from None
    except SafetensorError as error:
        what = pointer(path) or f"not a whole safetensors file ({error}); download it again"
        raise CorruptCheckpoint(f"{path} is {what}") from None
