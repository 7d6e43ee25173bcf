"""A file of tensors that is mapped, not read: whole or not at all, and found out if it is anything else.

    tensors, each at a multiple of 64 bytes
    the index: JSON, where each tensor lies and what it is, with a sha256 of its bytes, and what the writer adds
    the last 64 bytes: "manylora-weights", its version, the index's place and length (int64), its sha256

All numbers are little-endian. The end is written last, so a file that was cut has none. Knows nothing of models.
"""

import hashlib
import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64
VERSION = 1
_END = struct.Struct("<16sQqq24s")  # 24 bytes of a sha256 tell as much as 32
_MAGIC = b"manylora-weights"
PIECE = 1 << 24
"""Bytes that are hashed and written at a time."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.int8, torch.int16, torch.int32),
        *(torch.float16, torch.bfloat16, torch.float32),
    )
}


class BrokenFile(ValueError):
    """A file isn't what its writer wrote. One line: what is wrong with it."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """An open file. What it shows stays mapped as long as a tensor of it is held, be the file deleted or replaced."""

    facts: Mapping[str, Any]
    """What its writer added."""
    tensors: Mapping[str, Tensor]
    """To be read only: a write to them ends the process."""
    digests: Mapping[str, str]
    nbytes: int

    def damaged(self) -> str | None:
        """Return the name of a tensor that isn't what was written, or None. Reads all of the file."""
        for name, tensor in self.tensors.items():
            if _digest(tensor) != self.digests[name]:
                return name
        return None


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return about how long a file of these is."""
    return sum(tensor.nbytes + ALIGNED for tensor in tensors.values())


def write_file(file: BinaryIO, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a whole file, and have the system put it on the disk. Raises OSError."""
    entries = {}
    for name, tensor in tensors.items():
        at = file.tell()
        digest = hashlib.sha256()
        for piece in _pieces(tensor):
            digest.update(piece)
            file.write(piece)
        file.write(bytes(-tensor.nbytes % ALIGNED))
        kind = str(tensor.dtype).removeprefix("torch.")
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "at": at, "sha256": digest.hexdigest()}
    index = json.dumps({"facts": dict(facts), "tensors": entries}).encode()
    end = _END.pack(_MAGIC, VERSION, file.tell(), len(index), hashlib.sha256(index).digest()[:24])
    file.write(index + end)
    file.flush()
    os.fsync(file.fileno())


def open_file(path: Path) -> WeightFile:
    """Map a file. Its end and index are checked, of the tensors nothing is read. Raises BrokenFile, OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _END.size:
            raise BrokenFile("it has no end")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    index, limit = _index(mapped, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch knows no memory that can't be written to
        memory = torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))
    try:
        entries = {str(name): entry for name, entry in index["tensors"].items()}
        tensors = {name: _show(memory, entry, limit) for name, entry in entries.items()}
        digests = {name: str(entry["sha256"]) for name, entry in entries.items()}
        facts = dict(index["facts"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BrokenFile(f"its index is none: {error!r}") from None
    return WeightFile(facts, tensors, digests, size)


def _index(mapped: mmap.mmap, size: int) -> tuple[dict[str, Any], int]:
    """Return the index, and where it begins."""
    magic, version, at, length, digest = _END.unpack(mapped[size - _END.size :])
    if magic != _MAGIC:
        raise BrokenFile("it was cut, or is another kind of file")
    if version != VERSION:
        raise BrokenFile(f"it has version {version}, and {VERSION} is read")
    if at < 0 or length < 0 or at + length + _END.size != size:
        raise BrokenFile(f"its length of {size:,} bytes is not what its end says")
    text = mapped[at : at + length]
    if hashlib.sha256(text).digest()[:24] != digest:
        raise BrokenFile("its index is damaged")
    index: dict[str, Any] = json.loads(text)
    return index, at


def _show(memory: Tensor, entry: Mapping[str, Any], limit: int) -> Tensor:
    dtype, shape, at = DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]], int(entry["at"])
    end = at + math.prod(shape) * dtype.itemsize
    if at < 0 or at % ALIGNED or min(shape, default=0) < 0 or end > limit:
        raise ValueError(f"a tensor of {shape} at {at}")
    return memory[at:end].view(dtype).view(shape)


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    for first in range(0, len(flat), PIECE):
        yield flat[first : first + PIECE]


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()
