"""A checkpoint's tensors, read one at a time from safetensors shards. Pickle is never opened."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.errors import CorruptCheckpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """Names, shapes and tensors of a checkpoint directory. Close it, or use it in a ``with``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shard_of = _find_shards(directory)
        self._open: dict[str, Any] = {}  # safetensors has no public type for an open file
        for shard in sorted(set(self._shard_of.values())):
            self._open[shard] = _open_shard(directory / shard)
        self._shard_of = self._checked_names()

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._open[self._shard_of[name]].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor. Raises CorruptCheckpoint if it isn't there or can't be read."""
        try:
            tensor: Tensor = self._open[self._shard_of[name]].get_tensor(name)
        except KeyError:
            raise CorruptCheckpoint(f"{self.directory}: tensor {name!r} is missing") from None
        except SafetensorError as error:
            raise CorruptCheckpoint(f"{self.directory}: tensor {name!r} can't be read: {error}") from None
        return tensor

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked_names(self) -> Mapping[str, str]:
        """Return tensor name to shard as the shards have it; the index must agree."""
        found = {name: shard for shard, file in self._open.items() for name in file.keys()}  # noqa: SIM118
        missing = sorted(self._shard_of.keys() - found.keys() - {SINGLE})
        if missing:
            raise CorruptCheckpoint(f"{self.directory / INDEX} names {missing[0]!r}, which no shard has")
        return found


def _find_shards(directory: Path) -> Mapping[str, str]:
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise CorruptCheckpoint(f"{index} is not a safetensors index: {error}") from None
        return weight_map
    if (directory / SINGLE).is_file():
        return {SINGLE: SINGLE}
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise CorruptCheckpoint(
            f"{directory} has {pickles[0]} but no safetensors: pickle can run code and is not opened; "
            "convert it with transformers' save_pretrained"
        )
    raise CorruptCheckpoint(f"{directory} has neither {SINGLE} nor {INDEX}")


def _open_shard(path: Path) -> Any:
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing")
    try:
        # Checks the header against the file's size before anything is allocated.
        return safe_open(path, framework="pt").__enter__()
    except SafetensorError as error:
        raise CorruptCheckpoint(f"{path} is not a whole safetensors file: {error}") from None
