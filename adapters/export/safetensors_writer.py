"""Writes safetensors shards piece by piece: what is in them is known beforehand, the numbers come later.

The library's own writer wants a whole shard in memory. Format: https://github.com/huggingface/safetensors#format.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from manylora.quant.weight_files import INDEX, SINGLE

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


class ShardedWriter:
    """model.safetensors in ``directory``, or several of at most ``shard_bytes`` and their index.

    A tensor larger than ``shard_bytes`` has a shard of its own. OSError (a full disk) passes through.
    """

    def __init__(self, directory: Path, entries: Sequence[Entry], shard_bytes: int) -> None:
        self._directory = directory
        self._entries = {entry.name: entry for entry in entries}
        shards = _divide(entries, shard_bytes)
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        self._shards = dict(zip([SINGLE] if len(shards) == 1 else names, shards, strict=True))
        self._place: dict[str, tuple[str, int]] = {}
        for file, shard in self._shards.items():
            self._start(file, shard)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the shards."""
        return tuple(self._shards)

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write a tensor as the concatenation of ``pieces``, which must fill it exactly."""
        entry = self._entries[name]
        file, offset = self._place[name]
        written = 0
        with (self._directory / file).open("r+b") as out:
            out.seek(offset)
            for piece in pieces:
                assert piece.dtype == entry.dtype, (name, piece.dtype)
                raw = piece.contiguous().view(-1).view(torch.uint8).numpy()
                out.write(raw.data)
                written += raw.nbytes
        assert written == entry.nbytes, (name, written, entry.nbytes)

    def finish(self) -> None:
        """Write the index, if there are several shards, and see to it that all is on the disk."""
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(entry.nbytes for entry in self._entries.values())},
                "weight_map": {name: file for name, (file, _) in self._place.items()},
            }
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for file in self._shards:
            with (self._directory / file).open("rb") as out:
                os.fsync(out.fileno())

    def _start(self, file: str, shard: Sequence[Entry]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        offsets: dict[str, int] = {}
        # Wide types first, so that each tensor begins at a multiple of its type's size.
        for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
            end = offset + entry.nbytes
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, end],
            }
            offsets[entry.name], offset = offset, end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with (self._directory / file).open("xb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + offset)
        self._place.update({name: (file, 8 + len(raw) + begin) for name, begin in offsets.items()})


def _divide(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards
