"""Which files make an adapter, how large they may be, and the digest of their contents. Not their meaning."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, UnsupportedAdapter

WEIGHTS_FILE = "adapter_model.safetensors"
KNOWN_FILES = (
    "adapter_config.json",
    WEIGHTS_FILE,
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer_config.json",
)
"""In the order in which the digest takes them. The first two are required."""
MAX_TEXT_BYTES = 16 << 20
"""Limit of each file but the weights."""
MAX_DIGITS = 19
"""Digits of an integer in JSON: what 64 bits hold. Python's own have no end, and fit no float and no tensor."""
_CHUNK = 1 << 20
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where to look closer: Python reads such an escape alone, and nothing can write it again."""


def present_files(directory: Path, max_bytes: int) -> dict[str, int]:
    """Return the known files of ``directory`` with their sizes, checked before anything is read.

    Raises AdapterNotFound without an adapter_config.json, UnsupportedAdapter for pickled weights,
    InvalidAdapter for missing weights, anything that is no plain file, or sizes over the limits.
    """
    sizes = {name: size for name in KNOWN_FILES if (size := _plain_size(directory / name)) is not None}
    if KNOWN_FILES[0] not in sizes:
        raise AdapterNotFound("there is no adapter_config.json; a PEFT adapter is a directory with one")
    if WEIGHTS_FILE not in sizes:
        if (directory / "adapter_model.bin").exists():
            raise UnsupportedAdapter(
                "pickle can run code when it is read, so only safetensors are; save the adapter with"
                " safe_serialization=True",
                file="adapter_model.bin",
            )
        raise InvalidAdapter("the file is missing", file=WEIGHTS_FILE)
    for name, size in sizes.items():
        if name != WEIGHTS_FILE and size > MAX_TEXT_BYTES:
            raise InvalidAdapter(f"{size} bytes; at most {MAX_TEXT_BYTES}", file=name)
    if sum(sizes.values()) > max_bytes:
        raise InvalidAdapter(f"the files have {sum(sizes.values())} bytes together; at most {max_bytes}")
    return sizes


def _plain_size(path: Path) -> int | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidAdapter(f"can't be read: {error.strerror}", file=path.name) from error
    if not stat.S_ISREG(found.st_mode):
        raise InvalidAdapter("is not a plain file", file=path.name)
    return found.st_size


def read_json_object(path: Path) -> dict[str, object]:
    """Return the JSON object in a file of limited size. Raises InvalidAdapter naming the file."""
    with path.open("rb") as file:
        raw = file.read(MAX_TEXT_BYTES + 1)
    return parse_json_object(raw, path.name)


def parse_json_object(raw: bytes, file: str) -> dict[str, object]:
    """Return the JSON object in ``raw``, whose texts are all UTF-8. Raises InvalidAdapter naming ``file``."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_int=_integer)
        if _HALF_A_PAIR.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidAdapter("holds half a surrogate pair, which is no character", file=file) from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"is not JSON: {error}", file=file) from error
    if not isinstance(value, dict):
        raise InvalidAdapter("is not a JSON object", file=file)
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; at most {MAX_DIGITS}")
    return int(digits)


def fingerprint(directory: Path) -> tuple[tuple[int, int, int] | None, ...]:
    """Return what tells quickly whether the known files changed: inode, size and time of change of each."""
    marks: list[tuple[int, int, int] | None] = []
    for name in KNOWN_FILES:
        try:
            found = (directory / name).stat()
        except OSError:
            marks.append(None)
        else:
            marks.append((found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(marks)


def digest_of(directory: Path, max_bytes: int) -> str:
    """Return the sha256 over names, sizes and contents of the known files; reads them once."""
    return read_through(directory, present_files(directory, max_bytes), lambda name: lambda chunk: None)


def _opened(path: Path) -> BinaryIO:
    try:
        # Without O_NONBLOCK a pipe put in a file's place after the check would block this thread for ever.
        return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise InvalidAdapter(f"can't be read: {error.strerror}", file=path.name) from error


def read_through(
    directory: Path, sizes: dict[str, int], sink_of: Callable[[str], Callable[[bytes], object]]
) -> str:
    """Pass each file's chunks to ``sink_of(name)`` and return the digest of what was read.

    Raises InvalidAdapter if a file turns out longer or shorter than ``sizes`` says: it is being written to.
    """
    digest = hashlib.sha256()
    for name, size in sizes.items():
        digest.update(f"{name}\0{size}\0".encode())
        sink = sink_of(name)
        left = size
        with _opened(directory / name) as file:
            while chunk := file.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                sink(chunk)
        if left:
            raise InvalidAdapter("changed while it was read; try again when it is complete", file=name)
    return digest.hexdigest()
