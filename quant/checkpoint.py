"""A checkpoint's tensors, read one at a time from safetensors shards. Pickle is never opened."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from manylora.quant.errors import CorruptCheckpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: Path
    shape: tuple[int, ...]


class Checkpoint:
    """Names, shapes and tensors of a checkpoint directory. It holds no file open and no tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries = _read_headers(directory)

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
        entry = self._entry(name)
        # The file is mapped, and a tensor shows the map: without a copy it would change with the file and keep all
        # of it mapped. Opened anew for each tensor, since what was touched of a map counts as ours until it closes.
        try:
            with safe_open(entry.shard, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpoint(f"{entry.shard}: tensor {name!r} can't be read: {error}") from None
        return tensor

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CorruptCheckpoint(f"{self.directory}: tensor {name!r} is missing") from None


def _read_headers(directory: Path) -> Mapping[str, _Entry]:
    """Return what each shard holds; the index must agree."""
    promised = _find_shards(directory)
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(promised.values())):
        for name, entry in _read_header(directory / shard).items():
            if name in entries:
                raise CorruptCheckpoint(f"tensor {name!r} is in {entries[name].shard} and in {entry.shard}")
            entries[name] = entry
    missing = sorted(promised.keys() - entries.keys() - {SINGLE})
    if missing:
        raise CorruptCheckpoint(f"{directory / INDEX} names {missing[0]!r}, which no shard has")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing; download the checkpoint again")
    try:
        # Checks the header against the file's size before anything is allocated.
        file: Any = safe_open(path, framework="pt")  # safetensors has no public type for an open file
        with file:
            return {
                name: _Entry(path, tuple(file.get_slice(name).get_shape()))
                for name in file.keys()  # noqa: SIM118  # it isn't a mapping
            }
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(
            f"{path} is not a whole safetensors file ({error}); download it again"
        ) from None


def _find_shards(directory: Path) -> Mapping[str, str]:
    index = directory / INDEX
    if index.is_file():
        return _read_index(index)
    if (directory / SINGLE).is_file():
        return {SINGLE: SINGLE}
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise CorruptCheckpoint(
            f"{directory} has {others[0]} but neither {SINGLE} nor {INDEX}: rename it if it is the whole model"
        )
    pickles = sorted(path.name for end in ("*.bin", "*.pt", "*.pth") for path in directory.glob(end))
    if pickles:
        raise CorruptCheckpoint(
            f"{directory} has {pickles[0]} but no safetensors: pickle can run code and is not opened; "
            "convert it with transformers' save_pretrained"
        )
    raise CorruptCheckpoint(f"{directory} has neither {SINGLE} nor {INDEX}")


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map: object = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{index} is not a safetensors index: {error}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CorruptCheckpoint(f"{index} is not a safetensors index: weight_map is not names to files")
    outside = next((shard for shard in weight_map.values() if Path(shard).name != shard), None)
    if outside is not None:
        raise CorruptCheckpoint(f"{index} names {outside!r}, which is not a file beside it")
    return weight_map
