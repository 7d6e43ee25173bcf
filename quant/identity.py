"""Which model a checkpoint is, told by its files: two fine-tunes of one base have one config.json and other weights.

Independent of where the files are, of their times and of the machine. Not a checksum: of each tensor a few samples are
read, so that 15 GB take about a second. What changes a handful of values between them is not seen.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.weight_files import choose_weights

SAMPLE = 4096
"""Bytes of one sample."""
SAMPLES = 4
"""Samples of each tensor, spread evenly from its first bytes to its last; one that isn't larger is read whole."""
_LENGTH = 8
"""Bytes of a safetensors file that say how long its header is."""


def weights_identity(directory: Path) -> str:
    """Return 64 hex digits over config.json and each file of weights: its size, its header, samples of its tensors.

    Raises CorruptCheckpoint, OSError.
    """
    whole = hashlib.sha256()
    for part in _parts(directory):
        # Each part's length goes before it, so that no two lists of parts are one text.
        whole.update(len(part).to_bytes(_LENGTH, "little"))
        whole.update(part)
    return whole.hexdigest()


def config_fingerprint(directory: Path) -> str:
    """Return the sha256 of config.json, 64 hex digits."""
    return hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()


def _parts(directory: Path) -> Iterator[bytes]:
    yield (directory / "config.json").read_bytes()
    for name in choose_weights(directory).shards:
        path = directory / name
        yield str(path.stat().st_size).encode()
        with path.open("rb") as file:
            header = _header(file, path)
            yield header
            for start, end in _tensors(header, path):
                yield from _samples(file, _LENGTH + len(header) + start, end - start)


def _header(file: BinaryIO, path: Path) -> bytes:
    size = int.from_bytes(file.read(_LENGTH), "little")
    if size > path.stat().st_size:
        raise CorruptCheckpoint(f"{path} is not a whole safetensors file; download it again")
    return file.read(size)


def _tensors(header: bytes, path: Path) -> list[tuple[int, int]]:
    """Return where each tensor's bytes begin and end after the header, in the file's order."""
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        return sorted(
            (int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for entry in entries.values()
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path} has no safetensors header: {error}") from None


def _samples(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    if size <= SAMPLE * SAMPLES:
        file.seek(start)
        yield file.read(size)
        return
    for number in range(SAMPLES):
        file.seek(start + number * (size - SAMPLE) // (SAMPLES - 1))
        yield file.read(SAMPLE)
