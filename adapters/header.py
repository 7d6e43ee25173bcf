"""The header of a safetensors file, checked against the file's size before any tensor is allocated.

Format: https://github.com/huggingface/safetensors#format. The tensors themselves are read by the library.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import parse_json_object

MAX_HEADER_BYTES = 8 << 20
"""Limit where the caller doesn't know what tensors to expect."""
_ROOM_FOR_METADATA = 256 << 10
_ENTRY_BYTES = 200
"""Of a tensor in a header, beside its name: type, shape, offsets."""
MAX_DIMENSIONS = 8
_MAGNITUDE = "magnitude_vector"
"""What is a parameter in files, and a module with a weight in models."""
_BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it."""

    name: str
    """In the file."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """Bytes [begin, end) after the header."""


def header_limit(names: Iterable[str]) -> int:
    """Return the most bytes that a header with tensors of these names may have: twice what it needs, and metadata."""
    return _ROOM_FOR_METADATA + 2 * sum(len(name) + _ENTRY_BYTES for name in names)


def read_header(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> Mapping[str, TensorEntry]:
    """Return the tensors of a safetensors file by the names that peft's save_pretrained gives them.

    Raises InvalidAdapter when the header is longer than ``max_bytes`` (before it is read: parsing takes thirty
    times its size in memory), is malformed, or does not describe every byte of the file exactly once, and
    UnsupportedAdapter for tensors that are not floating point of 8 to 64 bits.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise _bad(
                path, f"{size} bytes can't hold a header of {length}: truncated, or no safetensors file"
            )
        if length > max_bytes:
            raise _bad(path, f"a header of {length} bytes; at most {max_bytes} are read for this base")
        raw = file.read(length)
    entries = [_entry(path, name, value) for name, value in _decode(path, raw).items()]
    _check_layout(path, entries, size - 8 - length)
    return _by_saved_name(path, entries)


def _by_saved_name(path: Path, entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for entry in entries:
        name = _saved_name(entry.name)
        if name in found:
            raise _bad(path, f"is there twice: also as {found[name].name!r}", entry.name)
        found[name] = entry
    return found


def _saved_name(name: str) -> str:
    """Return "….lora_A.weight" for "….lora_A.default.weight": a model's state dict names the adapter, too."""
    module, lora, rest = name.rpartition(".lora_")
    kind, default, tail = rest.partition(".default")
    if not (lora and default and tail[:1] in ("", ".")):
        return name
    return f"{module}{lora}{kind}{'' if kind == _MAGNITUDE else tail}"


def _decode(path: Path, raw: bytes) -> dict[str, object]:
    try:
        header = parse_json_object(raw, path.name)
    except InvalidAdapter as error:
        raise _bad(path, f"the header {error.message}") from error
    header.pop("__metadata__", None)
    return header


def _entry(path: Path, name: str, value: object) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    kind, shape, offsets = (
        fields.get("dtype"),
        _sizes(fields.get("shape")),
        _sizes(fields.get("data_offsets")),
    )
    if shape is None or offsets is None or len(offsets) != 2 or not isinstance(kind, str):
        raise _bad(path, "the header's entry is malformed; expected dtype, shape and data_offsets", name)
    if kind not in _BYTES_OF:
        what = f"dtype {kind} is not served; factors are {', '.join(_BYTES_OF)}"
        raise UnsupportedAdapter(what, file=path.name, tensor=name)
    begin, end = offsets
    if end - begin != math.prod(shape) * _BYTES_OF[kind]:
        raise _bad(path, f"shape {list(shape)} of {kind} does not fill its {end - begin} bytes", name)
    return TensorEntry(name, shape, begin, end)


def _sizes(value: object) -> tuple[int, ...] | None:
    # The product of a million sizes would keep this thread busy for hours.
    if (
        not isinstance(value, list)
        or len(value) > MAX_DIMENSIONS
        or not all(type(item) is int and item >= 0 for item in value)
    ):
        return None
    return tuple(value)


def _check_layout(path: Path, entries: Iterable[TensorEntry], data_bytes: int) -> None:
    position = 0
    for entry in sorted(entries, key=lambda item: (item.begin, item.end)):
        if entry.begin != position:
            raise _bad(path, f"begins at byte {entry.begin}, but {position} is the next free one", entry.name)
        position = entry.end
    if position != data_bytes:
        raise _bad(path, f"{data_bytes} bytes of tensors, but the header describes {position}: truncated")


def _bad(path: Path, message: str, tensor: str | None = None) -> InvalidAdapter:
    return InvalidAdapter(message, file=path.name, tensor=tensor)
